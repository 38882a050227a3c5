"""Chooses drafts for the jobs of a step: which drafter, and how many tokens."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from glm4_runtime.scheduler.drafts.chance import Chances, expected_tokens
from glm4_runtime.scheduler.drafts.costs import Allowance, StepCosts
from glm4_runtime.scheduler.drafts.drafter import Draft, Drafter, Offer

if TYPE_CHECKING:
    from glm4_runtime.scheduler.job import Job

logger = logging.getLogger(__name__)

# Tokens of a draft that costs nothing, and of one that a model makes token by token.
FREE_WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
MADE_WIDTHS = (1, 2, 3, 4, 5, 6, 8)
READY = 2  # a drafter that lags by no more tokens runs them within the draft
LEAST_GAIN = 1.02  # tokens per second with drafts over those without
LEAST_CHANCE = 0.2  # a model drafts for no request with a lower chance that a token is right ...
_RETRIED = 16  # ... except in one of so many steps in which it drafts for others
_PROBED = 2  # tokens of a draft that tries whether drafts pay by now
_UNKNOWN_COST = 0.2  # of a drafted token, in plain steps, before it is measured
_LAG_COST = 0.02  # the same for a token that a drafter catches up


@dataclass(frozen=True)
class Plan:
    """The drafts of one step.

    Attributes:
        chosen: offer and number of tokens, for each job that gets a draft.
        rate: tokens per second over those of a step without drafts.
    """

    chosen: "dict[Job, tuple[Offer, int]]"
    rate: float = 1.0


NO_DRAFTS = Plan({})


class Drafting:
    """Measures costs and chances, and drafts what gives the most tokens per second.

    The drafts of all jobs are verified in one run, in which all jobs have the width of the widest draft. A job without
    a draft, or with a shorter one, is padded.
    """

    def __init__(self, drafters: Sequence[Drafter], several: bool) -> None:
        """
        Args:
            several: whether one run takes several tokens of several jobs. If not, only a single job gets drafts.
        """
        self._drafters, self._several = list(drafters), several
        self._chances = {kind: Chances(prior) for one in drafters for kind, prior in one.kinds.items()}
        self._costs, self._allowance = StepCosts(), Allowance()
        self._free: dict[Job, Offer] = {}  # what could have been drafted in this step, at no cost
        self._spent = 0.0  # seconds of drafting in this step
        self._steps = 0

    def drafts(self, jobs: "Sequence[Job]", room: int, tokens: int) -> "dict[Job, Draft]":
        """Draft for jobs that all decode in the next run.

        Args:
            room: tokens that the longest of the jobs' sequences may still have after its next one.
            tokens: maximum tokens of the run.
        """
        self._free, self._spent, self._steps = {}, 0.0, self._steps + 1
        if not self._drafters or (len(jobs) > 1 and not self._several):
            return {}
        began = time.perf_counter()
        offers = {job: self._offers(job, room) for job in jobs}
        self._free = {job: one for job, some in offers.items() for one in some if one.ids is not None}
        most = min(room, tokens // len(jobs) - 1)
        drafts = self._made(self._ready_plan(offers, most, tokens)) if most > 0 else {}
        self._spent = time.perf_counter() - began
        return drafts

    def stepped(self, jobs: "Sequence[Job]", drafts: "Sequence[Draft]", seconds: float) -> None:
        """Record the time of a run of all ``jobs``, some of which had drafts."""
        count = len(jobs)
        if not drafts:
            self._costs.add_plain(count, seconds)
            self._allowance.add_plain()
            return
        width = max(len(draft.ids) for draft in drafts)
        self._costs.add_drafted(count, count * (1 + width), seconds)
        plain = self._costs.plain(count)
        if plain and any(draft.offer.ids is None for draft in drafts):
            self._allowance.spend((self._spent + seconds) / plain - 1)

    def judged(self, job: "Job", draft: Draft, right: int, wrong: bool, jobs: int) -> None:
        """Record that the first ``right`` tokens of a draft were right, and whether a wrong one followed.

        Args:
            jobs: the number of jobs in the draft's run.
        """
        chances = self._chances[draft.offer.kind]
        chances.learn(job, right, wrong)
        if job.lease is None:  # it has ended, and was forgotten
            chances.forget(job)
        if draft.offer.ids is None:
            self._allowance.spend(-right / jobs)

    def compared(self, job: "Job", token: int) -> None:
        """Record the token of a job that had no draft: would the draft have been right?"""
        offer = self._free.pop(job, None)
        if offer is not None and offer.ids is not None:
            right = int(offer.ids[0]) == token
            self._chances[offer.kind].learn(job, int(right), not right)

    def forget(self, job: "Job") -> None:
        """The job has ended or lost its slot."""
        self._free.pop(job, None)
        for chances in self._chances.values():
            chances.forget(job)
        for drafter in list(self._drafters):
            try:
                drafter.forget(job)
            except BaseException:
                self._drop(drafter)

    def close(self) -> None:
        for drafter in self._drafters:
            drafter.close()
        self._drafters = []

    # How it is done --------------------------------------------------------------------------

    def _offers(self, job: "Job", room: int) -> list[Offer]:
        most = min(room, job.continuation.limit - job.count - 1)
        found = []
        for drafter in list(self._drafters) if most > 0 else ():
            try:
                offer = drafter.offer(job)
            except BaseException:  # a panic in an extension is no Exception
                self._drop(drafter)
            else:
                if offer is not None:
                    found.append(replace(offer, most=min(offer.most, most)))
        return found

    def _ready_plan(self, offers: "dict[Job, list[Offer]]", most: int, tokens: int) -> Plan:
        """The best plan with drafters that are ready. Others catch up first, if the plan with them pays."""
        plan = self._best(offers, most)
        if plan is NO_DRAFTS:
            plan = self._probe(offers)
        late = [(job, offer) for job, (offer, _) in plan.chosen.items() if offer.lag > READY]
        if not late:
            return plan
        self._catch_up(late, tokens)
        ready = {
            job: [now for one in some if (now := self._renewed(job, one)) is not None and now.lag <= READY]
            for job, some in offers.items()
        }
        return self._best(ready, most)

    def _renewed(self, job: "Job", offer: Offer) -> Offer | None:
        if not offer.lag or offer.drafter not in self._drafters:
            return offer if offer.drafter in self._drafters else None
        now = offer.drafter.offer(job)
        return now and replace(now, most=min(now.most, offer.most))

    def _catch_up(self, late: "Sequence[tuple[Job, Offer]]", tokens: int) -> None:
        for drafter in {id(offer.drafter): offer.drafter for _, offer in late}.values():
            try:
                drafter.catch_up([job for job, offer in late if offer.drafter is drafter], tokens)
            except BaseException:
                self._drop(drafter)

    def _best(self, offers: "dict[Job, list[Offer]]", most: int) -> Plan:
        """The plan with the most tokens per second. No drafts, unless it gains enough."""
        if self._costs.plain(len(offers)) is None:
            return NO_DRAFTS
        all_offers = [offer for some in offers.values() for offer in some]
        free = (
            [0, *(w for w in FREE_WIDTHS if w <= most)]
            if any(one.ids is not None for one in all_offers)
            else [0]
        )
        made = (
            [0, *(w for w in MADE_WIDTHS if w <= most)] if any(one.ids is None for one in all_offers) else [0]
        )
        plans = (self._plan(offers, one, other) for one in free for other in made if one or other)
        best = max(plans, key=lambda plan: plan.rate, default=NO_DRAFTS)
        return best if best.rate >= LEAST_GAIN and best.chosen else NO_DRAFTS

    def _plan(self, offers: "dict[Job, list[Offer]]", free: int, made: int) -> Plan:
        """The plan with these widths of drafts that cost nothing and of those that a model makes."""
        chosen: dict[Job, tuple[Offer, int]] = {}
        total = 0.0
        for job, some in offers.items():
            best = 1.0
            for offer in self._worthwhile(job, some):
                width = min(made if offer.ids is None else free, offer.most)
                tokens = expected_tokens(self._chances[offer.kind].of(job), width)
                if tokens > best:
                    best, chosen[job] = tokens, (offer, width)
            total += best
        return Plan(chosen, total / len(offers) / self._cost(len(offers), chosen))

    def _worthwhile(self, job: "Job", offers: list[Offer]) -> list[Offer]:
        if self._steps % _RETRIED == 0:
            return offers
        return [
            one for one in offers if one.ids is not None or self._chances[one.kind].of(job) >= LEAST_CHANCE
        ]

    def _cost(self, jobs: int, chosen: "dict[Job, tuple[Offer, int]]") -> float:
        """Expected time of a step with these drafts, in steps without drafts."""
        plain = self._costs.plain(jobs)
        assert plain is not None
        if not chosen or not plain:
            return 1.0
        seconds = self._costs.drafted(jobs, jobs * (1 + max(width for _, width in chosen.values())))
        widths: dict[Drafter, list[int]] = {}
        for offer, width in chosen.values():
            if offer.ids is None:
                widths.setdefault(offer.drafter, []).append(width)
        for drafter, some in widths.items():
            known = drafter.seconds(len(some), max(some))
            seconds += max(some) * _UNKNOWN_COST * plain if known is None else known
        return seconds / plain

    def _probe(self, offers: "dict[Job, list[Offer]]") -> Plan:
        """Drafts that do not seem to pay, for the jobs whose chances were last good. Only as often as allowed."""
        made = [
            (job, one)
            for job, some in offers.items()
            for one in some
            if one.ids is None and one.most >= _PROBED
        ]
        if not made or self._costs.plain(len(offers)) is None:
            return NO_DRAFTS
        job, offer = min(made, key=lambda pair: pair[1].lag)
        chosen = {job: (offer, _PROBED)}
        cost = self._cost(len(offers), chosen) - 1 + offer.lag * _LAG_COST
        return Plan(chosen) if self._allowance.allows(cost) else NO_DRAFTS

    def _made(self, plan: Plan) -> "dict[Job, Draft]":
        drafts: dict[Job, Draft] = {}
        wanted: dict[Drafter, dict[Job, int]] = {}
        offers: dict[Job, Offer] = {}
        for job, (offer, width) in plan.chosen.items():
            if offer.ids is not None:
                drafts[job] = Draft(offer, offer.ids[:width])
            else:
                wanted.setdefault(offer.drafter, {})[job] = width
                offers[job] = offer
        for drafter, widths in wanted.items():
            try:
                made = drafter.draft(widths)
            except BaseException:
                self._drop(drafter)
                continue
            drafts.update({job: Draft(offers[job], ids) for job, ids in made.items() if len(ids)})
        return drafts

    def _drop(self, drafter: Drafter) -> None:
        """Go on without a drafter that failed. Called while its error is handled."""
        logger.exception("the drafter %r failed; generation goes on without it", drafter.name)
        self._drafters.remove(drafter)
        try:
            drafter.close()
        except BaseException:
            logger.exception("the drafter %r could not be closed", drafter.name)
