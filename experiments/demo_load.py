"""What the demo serves in: its memory, its pages, and how many run at once."""

# A request has at most 768 tokens, which is 64 pages of 12: a power of two, so that the buddy
# allocator rounds nothing up when Max reserves them. (Of 16 tokens it is 48 pages; a run
# would be 64, and Max would lose a quarter of its memory to our choice of page size.)
PAGE_SIZE = 12
# Max holds 16 requests. In the paper's Fig 2 it holds 7 of 2,048 tokens in 15,728; to scale that
# would be 5,898 tokens of ours. Twice that, so that four runs take minutes.
# SmolLM2-135M has 46,080 bytes a token in float32 (2 x 30 layers x 3 KV heads x 64 x 4 bytes). In
# bfloat16 two next tokens tie now and then, and how a step is cut decides between them.
KV_BYTES = 16 * 768 * 46_080
NUM_SLOTS = 48
