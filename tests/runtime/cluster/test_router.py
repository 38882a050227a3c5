"""The router prefers the replica with the longest prefix, unless this replica is too busy."""

import random

import numpy as np

from glm4_runtime.cluster.router import Router, Standing

PROMPT = tuple(range(100, 200))


def noted(**sequences):
    router = Router()
    for name, ids in sequences.items():
        router.note(name, ids, slots=4)
    return router


def test_the_longest_prefix_decides():
    router = noted(a=PROMPT[:20], b=PROMPT[:60], c=(1, 2, 3))
    assert router.choose(PROMPT, {name: Standing(4) for name in "abc"}, 8) == "b"


def test_a_replica_may_be_busier_by_half_its_slots_and_not_by_more():
    router = noted(a=PROMPT)
    assert router.choose(PROMPT, {"a": Standing(4, 2), "b": Standing(4, 0)}, 8) == "a"
    assert router.choose(PROMPT, {"a": Standing(4, 3), "b": Standing(4, 0)}, 8) == "b"


def test_a_short_prefix_is_not_worth_a_busier_replica():
    router = noted(a=PROMPT[:15])
    assert router.choose(PROMPT, {"a": Standing(4, 1), "b": Standing(4, 0)}, 8) == "b"


def test_a_full_queue_is_not_chosen_and_none_is_left_at_last():
    router = noted(a=PROMPT)
    full, open_ = Standing(4, 4, 2), Standing(4, 4, 1)
    assert router.choose(PROMPT, {"a": full, "b": open_}, 2) == "b"
    assert router.choose(PROMPT, {"a": full, "b": full}, 2) is None
    assert router.choose(PROMPT, {"a": full, "b": full}, None) == "a"
    assert router.choose(PROMPT, {}, None) is None


def test_a_replica_is_known_by_as_many_sequences_as_it_has_slots():
    router = Router()
    for first in range(6):
        router.note("a", [first] * 30, slots=4)
    free = {"a": Standing(4, 1), "b": Standing(4)}
    assert [router.choose([first] * 40, free, 8) for first in range(6)] == ["b", "b", "a", "a", "a", "a"]
    router.forget("a")
    assert router.choose([5] * 40, free, 8) == "b"


def test_conversations_compute_fewer_prompt_tokens_than_with_round_robin():
    """16 conversations of 6 turns share 4 system prompts, on 4 replicas of 4 slots; 8 requests run at any time."""

    def computed(choose):
        chance, router, tokens, active = random.Random(1), Router(), 0, []
        chats = [[chat % 4] * 200 + [1000 + chat] * 20 for chat in range(16)]
        turns = [chat for chat in range(16) for _ in range(6)]
        chance.shuffle(turns)
        for count, chat in enumerate(turns):
            chats[chat] += [5000 + count] * 30
            name = choose(router, chats[chat], count, {one: Standing(4, active.count(one)) for one in "abcd"})
            active = [*active[-7:], name]
            tokens += len(chats[chat]) - router.prefix(name, np.array(chats[chat]))
            router.note(name, chats[chat], 4)
        return tokens

    ours = computed(lambda router, ids, _, standings: router.choose(ids, standings, 8))
    robin = computed(lambda _router, _ids, count, _standings: "abcd"[count % 4])
    assert ours < 0.75 * robin, (ours, robin)


def test_a_prefix_counts_for_its_adapter_only():
    router, prompt = Router(), list(range(40))
    standings = {"one": Standing(4), "two": Standing(4)}
    router.note("two", prompt, 4, "poet")
    assert router.choose([*prompt, 1], standings, None, "poet") == "two"
    assert router.choose([*prompt, 1], standings, None) == "one"
    assert router.choose([*prompt, 1], standings, None, "clerk") == "one"
    assert router.prefix("two", np.array(prompt), "poet") == 39
    assert router.prefix("two", np.array(prompt)) == 0
