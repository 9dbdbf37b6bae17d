"""The whole engine on a tiny model: what it compiles, copies, refuses, and survives."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_engine import CONFIG, REQUESTS, TINY, build, outputs, params_of, setup_of

from jaxpage.config import ConfigError
from jaxpage.engine import loop, step
from jaxpage.engine.host import Engine
from jaxpage.engine.request import Request
from jaxpage.engine.run import MOST_IDLE, Run
from jaxpage.model.params import init_params
from jaxpage.model.placement import serving_params
from jaxpage.scheduling.policies import POLICIES


@pytest.mark.in_ci("apart-4-paged")
@pytest.mark.parametrize("allocator", ["paged", "max"])
@pytest.mark.parametrize(("form", "num_slots"), [("apart", 4), ("stacked", 4), ("apart", 1)])
def test_no_step_copies_the_pool(allocator, form, num_slots):
    """Temporaries stay far below a large pool, whichever form the weights are in."""
    check_nothing_is_copied(allocator, form, num_slots)


@pytest.mark.slow
@pytest.mark.parametrize("preemption", ["fine", "swap"])
def test_no_step_copies_the_pool_or_that_of_the_host(preemption):
    check_nothing_is_copied("lru", "apart", 4, preemption=preemption, host_pages=40_000)


def check_nothing_is_copied(allocator: str, form: str, num_slots: int, **changes) -> None:
    config = replace(
        CONFIG, num_pages=20_000, num_slots=num_slots, token_buckets=(num_slots, 16, 32), **changes
    )
    setup = setup_of(config, allocator=allocator)
    params = init_params(TINY, jax.random.key(0), jnp.float32)
    if form == "apart":
        params = serving_params(params, jnp.float32)
    state = jax.eval_shape(lambda: step.create(setup, jnp.float32))
    compiled = loop.serve_steps.lower(params, state, jnp.int32(1), setup=setup).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    pool_bytes = 2 * state.pool.keys.size * 4
    assert memory.temp_size_in_bytes < pool_bytes / 10
    # What the caller gives is what comes back, and XLA's CPU knows no memory but its own.
    assert memory.alias_size_in_bytes > pool_bytes + 2 * state.host_pool.keys.size * 4


@pytest.fixture
def num_compiled():
    """Tells how many programs XLA has compiled since the test began."""
    counted = []

    def listen(event: str, duration_secs: float, **_) -> None:
        counted.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: counted.count("/jax/core/compile/backend_compile_duration")
    jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_compiles_while_serving(num_compiled):
    # A queue of seven, so that no other test has compiled this engine before.
    engine = build(setup_of(replace(CONFIG, num_requests=7)))
    engine.compile()
    before = num_compiled()
    assert before > 0
    engine.serve(REQUESTS)
    engine.serve([replace(r, temperature=0.7, seed=5, max_new_tokens=3) for r in REQUESTS[:2]])
    assert num_compiled() == before


@pytest.mark.slow
def test_allocators_that_differ_by_rule_alone_are_one_program(num_compiled):
    config = replace(CONFIG, num_pages=32)
    params = params_of()
    build(setup_of(config, allocator="oracle"), params).compile()
    engines = [build(setup_of(config, allocator=name), params) for name in ("pow2", "max")]
    for engine in engines:
        engine.refusal(REQUESTS[0])  # the rule itself is a few small programs
    before = num_compiled()
    for engine in engines:
        engine.compile()
    assert num_compiled() == before
    assert [engine.setup.allocator.name for engine in engines] == ["pow2", "max"]


@pytest.mark.in_ci("max-decode_first")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("allocator", ["paged", "oracle", "max"])
def test_answers_do_not_depend_on_allocator_or_policy(allocator, policy):
    expected = outputs(build().serve(REQUESTS)[0])
    setup = setup_of(replace(CONFIG, num_pages=32), allocator=allocator, policy=policy)
    assert outputs(build(setup).serve(REQUESTS)[0]) == expected


def test_answers_do_not_depend_on_company_or_form_of_weights():
    engine = build()
    expected = outputs(engine.serve(REQUESTS)[0])
    assert [outputs(engine.serve([r])[0])[0] for r in REQUESTS] == expected
    stacked = init_params(TINY, jax.random.key(3), jnp.float32)
    assert outputs(build(params=stacked).serve(REQUESTS)[0]) == expected


@pytest.mark.slow
def test_more_requests_than_the_queue_holds_are_all_served_in_the_order_given():
    config = replace(CONFIG, num_requests=3)
    results, journal = build(setup_of(config)).serve(REQUESTS)
    assert [r.request.id for r in results] == [r.id for r in REQUESTS]
    assert outputs(results) == outputs(build().serve(REQUESTS)[0])
    assert journal.num_steps == len(journal.step_times_s)


def test_a_row_whose_logits_are_not_finite_ends_alone_and_poisons_no_one_after_it():
    model = replace(TINY, tie_embeddings=False)
    params = params_of(model)
    params["embed"] = params["embed"].at[77].set(jnp.nan)
    engine = build(setup_of(model=model), params)
    clean = outputs(engine.serve(REQUESTS)[0])
    poisoned = Request("bad", (1, 77, 2), 9, ignore_eos=True)
    results, _ = engine.serve([REQUESTS[0], poisoned, *REQUESTS[1:]])
    assert results[1].finish_reason == "error"
    assert "not finite" in str(results[1].error)
    assert outputs(results[:1] + results[2:]) == clean
    assert outputs(engine.serve(REQUESTS)[0]) == clean


def test_late_arrivals_wait_for_their_time_and_get_the_same_tokens():
    expected = outputs(build().serve(REQUESTS)[0])
    engine = build()
    engine.compile()
    late = [replace(r, arrival_s=0.05 * i) for i, r in enumerate(REQUESTS)]
    results, _ = engine.serve(late)
    assert outputs(results) == expected
    for result in results:
        assert result.finish_s >= result.first_token_s >= result.request.arrival_s


def test_listeners_hear_every_token_once_and_in_order():
    heard: dict[str, list[int]] = {}
    results, journal = build().serve(
        REQUESTS,
        steps_per_read=2,
        on_tokens=lambda request_id, _, ids: heard.setdefault(request_id, []).extend(ids),
    )
    assert heard == {r.request.id: r.output_ids for r in results}
    assert journal.num_host_reads >= journal.num_steps / 2


def test_what_is_asked_on_reading_a_result_is_served_as_if_asked_at_once():
    engine = build()
    first = [replace(r, id=f"{r.id}.0", max_new_tokens=4) for r in REQUESTS[:3]]

    def next_turn(result):
        conversation, turn = result.request.id.split(".")
        if turn == "2":
            return None
        prompt = (*result.request.prompt_ids, *result.output_ids, 7, 8)
        if conversation == "1":
            prompt = (1,) * 60  # too long: it is refused, and its conversation ends
        return replace(
            result.request,
            id=f"{conversation}.{int(turn) + 1}",
            prompt_ids=prompt,
            arrival_s=result.finish_s + 0.02,
        )

    results, _ = engine.serve(first, then=next_turn)
    ids = [result.request.id for result in results]
    assert ids[:3] == ["0.0", "1.0", "2.0"]
    assert sorted(ids[3:]) == ["0.1", "0.2", "1.1", "2.1", "2.2"]
    refused = results[ids.index("1.1")]
    assert "60 tokens" in str(refused.error) and refused.output_ids == []
    answered = [result for result in results if result is not refused]
    assert all(r.first_token_s >= r.request.arrival_s for r in answered)
    again = [replace(result.request, arrival_s=0.0) for result in answered]
    assert outputs(engine.serve(again)[0]) == outputs(answered)


def test_ids_must_be_distinct():
    with pytest.raises(ConfigError, match="'0' occurs twice"):
        build().serve([REQUESTS[0], REQUESTS[0]])
    with pytest.raises(ConfigError, match="'0' occurs twice"):
        build().serve(REQUESTS[:1], then=lambda result: result.request)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt_ids": ()}, "empty"),
        ({"prompt_ids": (1,) * 60}, "60 tokens"),
        ({"prompt_ids": (1, 128)}, "128"),
        ({"prompt_ids": (-1,)}, "-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_a_request_that_cannot_be_served_gets_a_reason_and_the_next_is_served(change, words):
    engine = shared_engine()
    bad = replace(REQUESTS[0], id="bad", **change)
    results, _ = engine.serve([bad, REQUESTS[1]])
    assert words in str(results[0].error)
    assert results[0].finish_reason == "error" and results[0].output_ids == []
    assert results[1].error is None and len(results[1].output_ids) == 9


_SHARED: list[Engine] = []


def shared_engine() -> Engine:
    if not _SHARED:
        _SHARED.append(build())
    return _SHARED[0]


def test_the_recorded_page_map_names_the_owner_of_every_page():
    config = replace(CONFIG, record_page_map=True)
    _, journal = build(setup_of(config)).serve(REQUESTS)
    nobody = config.num_requests
    for record, owners in zip(journal.records, journal.owners, strict=True):
        owned = np.asarray(owners) < nobody
        held = (record["token_states"] + record["reservation"] + record["internal"]) // 4
        assert owned.sum() == held
        assert len(set(np.asarray(owners)[owned])) == record["num_running"]


@pytest.mark.slow
def test_bfloat16_serves_and_is_close_to_float32():
    """Rounded weights and KV move log probabilities by little; the greedy first token stays."""
    exact = build().serve(REQUESTS)[0]
    rounded = build(params=params_of(dtype=jnp.bfloat16), kv_dtype=jnp.bfloat16).serve(REQUESTS)[0]
    for a, b in zip(exact, rounded, strict=True):
        assert len(a.output_ids) == len(b.output_ids)
        assert abs(a.logprobs[0] - b.logprobs[0]) < 0.05


def test_a_run_in_which_nothing_is_done_ends_with_an_error_and_not_never():
    run = Run.of(num_replicas=2, num_rows=4)
    idle = np.ones((MOST_IDLE,), np.bool_)
    run.note_idle(0, idle)
    run.note_idle(1, idle)
    run.note_idle(0, np.array([True, False, True]))
    run.note_idle(0, idle[1:])
    with pytest.raises(AssertionError, match=rf"nothing was done in {MOST_IDLE + 1} steps"):
        run.note_idle(1, idle[:1])
