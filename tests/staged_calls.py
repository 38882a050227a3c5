"""Series of calls whose results are compared between a staged and an unstaged bundle."""

import random

import numpy as np

from glm4_runtime import SamplingParams, Session
from glm4_runtime.errors import Glm4Error


def driven(folder, seed, steps=50, change=lambda session: session, **options):
    """All logits and errors of a session in a seeded series of calls, in chunks of 7. ``change``: of the session."""
    rng, found = random.Random(seed), []
    with Session.open(folder, **{"threads": 2} | options) as session:
        change(session).prefill_chunk = 7
        vocab = session.manifest.model.vocab_size

        def one():
            used = [slot for slot in range(4) if slot not in session.free_slots()]
            call = rng.choice(
                ["prefill", "decode", "decode", "decode", "truncate", "copy", "release", "discard"]
            )
            slot, ids = rng.randrange(4), [rng.randrange(vocab) for _ in range(rng.randint(1, 40))]
            if call == "prefill":
                return session.prefill(slot, ids, rng.choice(["last", "all"]))
            if call == "decode":
                some = {each: rng.randrange(vocab) for each in rng.sample(used, rng.randint(0, len(used)))}
                return np.array([row for _, row in sorted(session.decode(some).items())])
            if call == "truncate":
                return session.truncate(slot, rng.randint(0, session.length(slot)))
            if call == "copy":
                return session.copy_prefix(slot, rng.randrange(4), rng.randint(0, session.length(slot)))
            return (session.release if call == "release" else session.discard)(slot)

        for _ in range(steps):
            try:
                found.append(one())
            except Glm4Error as error:
                found.append(str(error))
    return found


def assert_equal(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        if isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, other)
        else:
            assert one == other


def scored(folder, change=lambda session: session, **options):
    """Tokens of greedy and sampled answers, all scores of a prompt, and positions that are copied out and in."""
    return list(_scored(folder, change, options))


def _scored(folder, change, options):
    prompt = list(range(5, 60))
    with Session.open(folder, **options) as session:
        change(session).prefill_chunk = 16
        for params in (
            SamplingParams(max_tokens=24, ignore_eos=True),
            SamplingParams(max_tokens=24, ignore_eos=True, temperature=1.0, top_p=0.9, seed=7),
        ):
            yield [token.id for token in session.generate(prompt, params)]
        yield from session.score(prompt, chunk=9)
        for one in session.log_likelihoods(prompt[:20], [prompt[20:24], [7, 8]]):
            yield one.logprobs
        yield session.rolling_log_likelihood(prompt).logprobs
        session.prefill(0, prompt)
        block = session.read_positions(0, 3, 50)
        yield block
        session.copy_prefix(0, 2, 3)
        session.append_positions(2, block)
        yield session.decode({2: 9})[2]
