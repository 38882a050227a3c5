"""Target ``ort`` in int8 and int4: the size of a step changes the rounding of a product, and nothing else does."""

import numpy as np
import pytest
from scheduling import drive, submit

from glm4_runtime import SamplingParams, Session
from glm4_runtime.scheduler import Request, Scheduler

SLOTS = 4
# Logits of the single run that lie so close may come out in either order. On the demo the largest difference between a
# request alone and in a crowd was 0.097 in log-probability.
TIE = 0.2


@pytest.fixture(params=["int8", "int4"])
def session(demo_quantized, request):
    with Session.open(demo_quantized[request.param], threads=1, max_batch_size=SLOTS) as opened:
        yield opened


def prompts(session, count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 2000, rng.integers(3, 90)).tolist() for _ in range(count)]


def gap(session, ids):
    """How far apart the two likeliest next tokens are, in a run of their own."""
    second, first = np.partition(session.prefill(0, ids)[0], -2)[-2:]
    session.release(0)
    return float(first - second)


def test_what_the_neighbours_say_changes_no_bit(session):
    prompt, *others = prompts(session, SLOTS)
    found = []
    for neighbours in (others, [list(reversed(other)) for other in others]):
        for slot, ids in enumerate([prompt, *neighbours]):
            session.prefill(slot, ids)
        for token in (5, 6, 7):
            logits = session.decode(
                {slot: token + 10 * slot + len(found) for slot in range(1, SLOTS)} | {0: token}
            )
        found.append(logits[0])
        for slot in range(SLOTS):
            session.release(slot)
    assert (found[0] == found[1]).all()


def test_an_answer_in_a_crowd_leaves_the_one_alone_at_a_tie_only(session):
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    asked = [Request(tuple(ids), params) for ids in prompts(session, 24)]
    scheduler = Scheduler(session, max_queue=len(asked))
    listeners = [submit(scheduler, one)[0] for one in asked]
    drive(scheduler)
    scheduler.stop()
    different = 0
    for one, listener in zip(asked, listeners, strict=True):
        alone = [token.id for token in session.generate(one.prompt_ids, params)]
        assert len(listener.ids) == len(alone) == 24
        if listener.ids != alone:
            different += 1
            first = next(place for place in range(24) if listener.ids[place] != alone[place])
            assert gap(session, [*one.prompt_ids, *alone[:first]]) < TIE
    assert different <= 4  # of 520 there were 18 in int8 and 13 in int4
