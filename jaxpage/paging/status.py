"""Outcomes of paging operations, as values: arrays of small integers, with a sentence each.

Statuses merge by maximum (`jnp.maximum`): `OK` is the smallest, so the merge of several outcomes
is `OK` only if all are.
"""

OK = 0
OUT_OF_PAGES = 1
SLOT_FULL = 2

SENTENCES = {
    OK: "done",
    OUT_OF_PAGES: "not enough free pages: release or preempt a sequence, then try again",
    SLOT_FULL: "the sequence would outgrow its slot: raise pages_per_slot",
}
