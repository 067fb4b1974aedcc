"""The bytes that may be in memory: who waits, who comes first, what a silent server takes."""

from __future__ import annotations

import random

import trio
import trio.testing

from imgfs.budget import FIRST_SHARE, STALL_S, Budget, Lease

LIMIT = 1000
OTHERS = LIMIT - LIMIT // FIRST_SHARE


def run(main: object) -> None:
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))  # type: ignore[arg-type]


def test_readers_come_first() -> None:
    async def main() -> None:
        budget, order = Budget(LIMIT), list[str]()

        async def take(name: str, first: bool) -> None:
            lease = await budget.lease(600, first=first)
            budget.land(lease)
            order.append(name)
            await trio.sleep(0.01)
            budget.give(lease)

        held = await budget.lease(OTHERS)
        budget.land(held)
        async with trio.open_nursery() as nursery:
            for name in ("ahead", "ahead again"):
                nursery.start_soon(take, name, False)
                await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(take, "reader", True)
            await trio.testing.wait_all_tasks_blocked()
            assert (order, budget.waiting) == ([], 3)
            budget.give(held)
        assert order[0] == "reader" and order[1:] == ["ahead", "ahead again"]
        assert budget.used == 0

    run(main)


def test_a_reader_finds_room_beside_readahead() -> None:
    async def main() -> None:
        budget = Budget(LIMIT)
        budget.land(await budget.lease(10 * LIMIT))
        assert budget.used == OTHERS
        async with budget.holding(LIMIT - OTHERS):
            assert budget.used == LIMIT
        assert budget.used == OTHERS

    run(main)


def test_what_a_silent_server_has_is_lent() -> None:
    async def main() -> None:
        budget = Budget(LIMIT)
        silent = [await budget.lease(LIMIT // 4, first=True) for _ in range(4)]
        before = trio.current_time()
        mine = await budget.lease(LIMIT, first=True)
        assert trio.current_time() - before <= 2 * STALL_S
        assert budget.used == LIMIT
        budget.land(mine)
        budget.land(silent[0])  # it answers after all, and its bytes are there
        assert budget.used == LIMIT + LIMIT // 4
        for lease in (*silent, mine):
            budget.give(lease)
        assert budget.used == 0

    run(main)


def test_what_has_come_is_not_lent() -> None:
    async def main() -> None:
        budget = Budget(LIMIT)
        lease = await budget.lease(LIMIT, first=True)
        budget.land(lease)
        with trio.move_on_after(10 * STALL_S) as scope:
            await budget.lease(1, first=True)
        assert scope.cancelled_caught
        assert (budget.used, budget.waiting) == (LIMIT, 0)

    run(main)


def test_what_stays_leaves_room() -> None:
    budget = Budget(LIMIT)
    most = LIMIT * 5 // 8
    assert budget.has_room(most)
    budget.add(most)
    assert not budget.has_room(1)
    budget.sub(most)
    assert budget.has_room(1) and budget.peak == most


def test_at_random() -> None:
    """The limit is held, all are served, and nothing is left, whoever is cancelled."""

    async def main() -> None:
        rng, budget = random.Random(1), Budget(LIMIT)
        served = 0

        async def one(cost: int, first: bool, patience_s: float) -> None:
            nonlocal served
            with trio.move_on_after(patience_s):
                lease: Lease = await budget.lease(cost, first=first)
                try:
                    await trio.sleep(rng.random() * STALL_S / 10)
                    budget.land(lease)
                    await trio.sleep(rng.random() / 100)
                    served += 1
                finally:
                    budget.give(lease)
            assert budget.used >= 0

        async with trio.open_nursery() as nursery:
            for _ in range(500):
                patience_s = rng.choice((0.05, 1e6))
                nursery.start_soon(one, rng.randint(1, 2 * LIMIT), rng.random() < 0.5, patience_s)
                await trio.sleep(rng.random() / 100)
        assert (budget.used, budget.kept, budget.waiting) == (0, 0, 0)
        assert served > 200
        assert budget.peak <= LIMIT

    run(main)
