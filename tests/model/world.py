"""A model of the protocol: two relays, a PostgreSQL and a Redis, as values that can be compared and hashed.

A relay has two transactions: one that holds the leader's row, for the batch in hand, and one in which it claims ahead
what comes next, while Redis works on that batch. The second one locks the leader's row when the first has committed.

The servers are the small functions in here. What a relay decides is decided by the product: `outbox.protocol`. An
action of the model is one statement of the step, and between any two actions anything else may happen:

    the service commits an event            a relay crashes, or is frozen until PostgreSQL has ended its transaction
    Redis refuses an event, and takes it    Redis persists what it has, or forgets what it has not persisted
    somebody deletes a stream
    the journal is purged                   PostgreSQL fails over to a standby that lacks its last commits

`Rules` are the protocol's; each can be broken, to see that the search finds what follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from outbox import protocol
from outbox.protocol import Added, Adopt, Ahead, Answer, Behind, Bury, Fill, Gone, Refused, SendAgain

MAX_ATTEMPTS = 2
NOBODY = -1


class Event(NamedTuple):
    """An event as the relay's claim returns it; its `id` stands for its mark in Redis, too."""

    id: int
    key: str
    priority: int
    attempts: int = 0
    stream: str = "s"


class Rules(NamedTuple):
    """What the protocol rests on."""

    compare_and_set: bool = True  # Redis takes a batch only if it stands at the one before
    publish_first: bool = True  # and the commit after it
    one_leader: bool = True  # else every relay claims, and skips the rows that another has locked
    journal_outlives_loss: bool = True  # a batch is purged only when Redis cannot forget it any more
    adopt_by_ids: bool = True  # else by another claim
    ask_again: bool = (
        True  # a relay recovers by what Redis says while it holds the lock, not by what it said before
    )
    same_connection: bool = True  # a step publishes on a connection that it had when it knew that it leads
    remember_batches: bool = True  # Redis knows what is in its last batches, not in the very last alone
    note_refusals: bool = True  # Redis remembers what it refused of a journal batch until it is a dead letter
    wait_for_rows: bool = True  # a claim waits for rows that another transaction holds, and skips none
    wait_ahead: bool = True  # so does one that is made ahead
    refused_ends_ahead: bool = (
        True  # of a batch of which something is put back, the next claim goes back, too
    )
    lead_again: bool = True  # who claimed ahead locks the leader's row
    read_again: bool = True  # and reads the batch
    recover_empty_handed: bool = True  # what was claimed ahead goes back before anything is recovered
    compare_lanes: bool = True  # Redis adds to no lane that has had more than it has
    note_progress: bool = True  # and remembers how far a lane has been filled again
    fill_from_start: bool = True  # which starts over when the lane is lost again meanwhile
    fill_the_lost_only: bool = True  # and is not done to a lane that is whole
    compare_progress: bool = True  # nor by who takes it for further than it is
    idle_timeout: bool = (
        True  # PostgreSQL ends a transaction that its relay leaves idle, as to wait in another
    )


AS_IT_IS = Rules()


class Map(dict[Any, Any]):
    """A dict that is part of a state."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


class Redis(NamedTuple):
    """The streams and the state that the script keeps."""

    lanes: tuple[tuple[int, ...], ...] = ((), ())  # primary, backfill
    batch: int = 0
    ids: tuple[tuple[int, tuple[int, ...]], ...] = ()  # what is in the batches
    refused: tuple[int, Map, tuple[int, ...]] | None = None  # of a journal batch: its number, refused, held
    last: tuple[int, ...] = (0, 0)  # how many entries each lane has had
    filled: tuple[int, ...] = (0, 0)  # of a lane that is filled again, the last journal batch that was added


class Sent(NamedTuple):
    """A batch that Redis has been given, and what it answers when it is asked."""

    events: tuple[Event, ...]
    answer: Answer


class Filling(NamedTuple):
    """Lanes that are filled again up to a batch, and how far that has come."""

    lanes: tuple[int, ...]
    stands: int
    done: tuple[int, int] = (0, 0)  # journal batch, lane
    after: tuple[int, ...] = (0, 0)  # of each lane, the last batch that was sent


class Change(NamedTuple):
    """What a transaction has done and not committed."""

    batches: tuple[tuple[int, tuple[int, ...]], ...] = ()  # of the journal
    deleted: tuple[int, ...] = ()
    back: tuple[tuple[int, int], ...] = ()  # rows put back: id and attempts
    dead: tuple[int, ...] = ()


class Relay(NamedTuple):
    """A relay at a point of its step."""

    at: str = "idle"  # the statement that comes next
    tx: bool = False  # its transaction lives, and holds the leader's row
    link: bool = False  # its connection to Redis lives
    expected: int = 0
    hand: Any = ()  # claimed events, an answer, a change
    wants: tuple[Event, ...] = ()  # what a claim waits for
    ahead: tuple[Event, ...] = ()  # what its second transaction has claimed, for as long as that one lives
    doubt: tuple[int, ...] = ()  # lanes of which Redis is to be asked first
    unled: bool = False  # against the rule, its transaction has not locked the leader's row

    def rest(self) -> Relay:
        """Return the relay after its step; what it has in hand is gone, its connection is not."""
        return Relay(link=self.link)


class Tables(NamedTuple):
    """What PostgreSQL has committed."""

    written: int
    rows: tuple[tuple[int, int], ...]
    batch: int
    journal: tuple[tuple[int, tuple[int, ...]], ...]
    dead: tuple[int, ...]


class World(NamedTuple):
    """Everything."""

    events: tuple[Event, ...]
    crashes: int = 2
    losses: int = 1
    freezes: int = 1
    spoils: int = 1
    failovers: int = 0
    deletions: int = 0
    claims_ahead: bool = True
    claims_late: bool = False  # and also when Redis is done with the batch, before it reads the answer
    batch_size: int = 2
    written: int = 0  # events that the service has committed
    bad: int = NOBODY  # the event that Redis refuses
    rows: tuple[tuple[int, int], ...] = ()  # the table outbox: id and attempts
    batch: int = 0
    journal: tuple[tuple[int, tuple[int, ...]], ...] = ()
    dead: tuple[int, ...] = ()
    redis: Redis = Redis()
    past: tuple[Redis, ...] = ()  # what Redis would come back with if it crashed
    standby: tuple[Tables, ...] = ()  # what PostgreSQL would come back with if it failed over
    gone: tuple[
        int, ...
    ] = ()  # events that nobody can know: their transactions, or lane and journal, are lost
    orphans: tuple[int, ...] = ()  # rows that the second transaction of a relay that crashed still holds
    relays: tuple[Relay, Relay] = (Relay(), Relay())


class Broken(Exception):
    """Raised when the promise is broken; says how."""


Moves = Iterator[tuple[str, World]]


# -- Redis ----------------------------------------------------------------------------------------------------


def ask(redis: Redis, known: int, number: int, events: Sequence[Event], bad: int = NOBODY, *,
        again: bool = False, about: Sequence[int] = (), rules: Rules = AS_IT_IS) -> tuple[Redis, Answer]:  # fmt: skip
    """Return what the script does with a batch, and what it answers."""
    if redis.refused:
        return redis, Refused(*redis.refused, note=b"")
    if rules.compare_and_set and redis.batch > known:
        kept = Map({n: ids for n, ids in redis.ids if n > known})
        if not rules.remember_batches:
            kept = Map({redis.batch: kept[redis.batch]})
        return redis, Ahead(redis.batch, kept)
    if rules.compare_and_set and redis.batch < known:
        return redis, Behind(redis.batch)
    asked = {*about, *(_lane(event) for event in events)}
    gone = tuple(lane for lane in sorted(asked) if _is_lost(redis, lane))
    if gone and rules.compare_lanes:
        return redis, Gone(gone)  # type: ignore[arg-type]
    refused, held, added, stopped = Map(), [], [], set()
    for place, event in enumerate(events):
        if event.key in stopped:
            held.append(place)
        elif event.id == bad:
            refused[place] = "refused"
            stopped.add(event.key)
        else:
            added.append(event)
    note = (number, refused, tuple(held)) if again and refused and rules.note_refusals else redis.refused
    ids = (*redis.ids, (number, tuple(event.id for event in added)))
    redis = redis._replace(batch=number, ids=ids, refused=note)
    return _add(redis, added), Added(refused, tuple(held))


def _lane(event: Event) -> int:
    return int(event.priority < 0)


def _went_back(redis: Redis, lane: int) -> bool:
    return len(redis.lanes[lane]) < redis.last[lane]


def _add(redis: Redis, events: Sequence[Event]) -> Redis:
    for lane in {_lane(event) for event in events}:
        entries = (*redis.lanes[lane], *(event.id for event in events if _lane(event) == lane))
        redis = redis._replace(
            lanes=_put(redis.lanes, lane, entries), last=_put(redis.last, lane, len(entries))
        )
    return redis


def _put(values: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*values[:place], value, *values[place + 1 :])


def restore(redis: Redis, stands: int, lane: int, after: int, number: int, events: Sequence[Event], bad: int,
            rules: Rules) -> tuple[Redis, Answer]:  # fmt: skip
    """Return what the script does with a journal batch for a lane that was lost, and what it answers."""
    done = redis.filled[lane]
    if redis.refused:
        return redis, Refused(*redis.refused, note=b"")
    if redis.batch != stands:
        return redis, Behind(redis.batch)
    if done and _went_back(redis, lane) and rules.fill_from_start:
        return redis._replace(filled=_put(redis.filled, lane, 0)), Gone((lane,))  # type: ignore[arg-type]
    if not done and not _went_back(redis, lane) and rules.fill_the_lost_only:
        return redis, Added({}, ())
    if done < after and rules.compare_progress:
        return redis, Gone((lane,))  # type: ignore[arg-type]
    if not number:
        last = redis.last if done else _put(redis.last, lane, 0)
        return redis._replace(last=last, filled=_put(redis.filled, lane, 0)), Added({}, ())
    if number <= done and rules.note_progress:
        return redis, Added({}, ())
    mine = [event for event in events if _lane(event) == lane]
    refused = Map(
        {place: "refused" for place, event in enumerate(events) if event in mine and event.id == bad}
    )
    added = [event for event in mine if event.id != bad]
    last = redis.last if done or added else _put(redis.last, lane, 0)
    note = (number, refused, ()) if refused and rules.note_refusals else redis.refused
    redis = redis._replace(last=last, filled=_put(redis.filled, lane, number), refused=note)
    return _add(redis, added), Added(refused, ())


def _asked(world: World, redis: Redis) -> World:
    """Return the world after Redis was asked; a change can be forgotten until it is persisted."""
    past = world.past
    if redis != world.redis and world.losses:
        past = (*past, world.redis)
    return world._replace(redis=redis, past=past)


# -- PostgreSQL -----------------------------------------------------------------------------------------------


def _due(world: World, me: int, rules: Rules, retry: bool, own: Sequence[Event] = (),
         skip: bool = False) -> tuple[Event, ...]:  # fmt: skip
    """Return what a claim wants: in order, not its relay's own, and nothing behind a refused event of its key."""
    rows = [world.events[id]._replace(attempts=attempts) for id, attempts in world.rows]
    waiting = [row for row in rows if row.attempts]
    passed = {event.id for event in own} | (_locked(world, me) if skip or not rules.one_leader else set())
    due = [
        row
        for row in rows
        if row.id not in passed
        and (retry or not row.attempts)
        and not any(other.key == row.key and other.id < row.id for other in waiting)
    ]
    return tuple(sorted(due, key=lambda row: (-row.priority, row.id))[: world.batch_size])


def _locked(world: World, me: int) -> set[int]:
    """Return the rows that others' transactions have deleted, and not committed."""
    other = world.relays[1 - me]
    locked = {*world.orphans} | {event.id for event in other.ahead}
    if other.tx and isinstance(other.hand, Change):
        locked |= {*other.hand.deleted}
    elif other.tx and other.at in ("publish", "wait", "claim ahead", "wait ahead"):
        locked |= {event.id for event in _in_hand(other)}
    return locked


def _in_hand(relay: Relay) -> tuple[Event, ...]:
    return relay.hand.events if isinstance(relay.hand, Sent) else relay.hand


def _taken(world: World, me: int, wants: Sequence[Event]) -> tuple[tuple[Event, ...], bool]:
    """Return the rows that a claim gets, in the order of their place, before the first that it must wait for.

    And whether it has them all: but for those that are gone since it has seen them.
    """
    locked, got = _locked(world, me), set()
    for event in sorted(wants, key=lambda event: event.id):
        if (event.id, event.attempts) in world.rows:
            if event.id in locked:
                return tuple(event for event in wants if event.id in got), False
            got.add(event.id)
    return tuple(event for event in wants if event.id in got), True


def _committed(world: World, change: Change) -> World:
    deleted = {*change.deleted}
    rows = [row for row in world.rows if row[0] not in deleted] + [*change.back]
    return _kept(world)._replace(
        rows=tuple(sorted(rows)),
        batch=max([world.batch, *(number for number, _ in change.batches)]),
        journal=(*world.journal, *change.batches),
        dead=tuple(sorted({*world.dead, *change.dead})),
    )


def _kept(world: World) -> World:
    """Return the world whose standby may stay where PostgreSQL is before its next commit."""
    if not world.failovers:
        return world
    tables = Tables(*(getattr(world, name) for name in Tables._fields))
    return world._replace(standby=(*world.standby, tables))


def _failed_over(world: World, standby: Tables) -> World:
    relays = tuple(_ended(relay, ahead=True)._replace(tx=False) for relay in world.relays)
    lost = (*range(standby.written, world.written),)
    back = world._replace(**standby._asdict() | {"written": world.written})
    return back._replace(failovers=world.failovers - 1, standby=(), gone=lost, relays=relays,
                         orphans=())  # fmt: skip


# -- a step of a relay, statement by statement ----------------------------------------------------------------


def _moves(world: World, me: int, rules: Rules) -> Moves:
    relay = world.relays[me]
    if not relay.tx and relay.at in IN_TRANSACTION:
        yield "finds that its transaction is gone", _with(world, me, relay.rest())
    elif not relay.link and relay.at in ON_CONNECTION and rules.same_connection:
        yield "finds its connection to Redis closed", _with(world, me, relay.rest())
    else:
        yield from STATEMENTS[relay.at](world, me, relay, rules)


def _leads(relay: Relay) -> bool:
    return relay.tx and not relay.unled


def _with(world: World, me: int, relay: Relay) -> World:
    return world._replace(relays=(relay, world.relays[1]) if me == 0 else (world.relays[0], relay))


def _begin(world: World, me: int, relay: Relay, rules: Rules) -> Moves:
    if not (rules.one_leader and _leads(world.relays[1 - me])):
        yield "begins, and locks the leader's row", _with(world, me, relay._replace(at="look", tx=True))


def _look(world: World, me: int, relay: Relay, rules: Rules) -> Moves:
    """Read the batch. Who has just connected to Redis asks it where it stands."""
    if relay.ahead:
        yield from _look_ahead(world, me, relay, rules)
        return
    if relay.hand and relay.expected == world.batch:
        read = relay._replace(at="recover", link=True)
    else:
        read = Relay(
            "claim" if relay.link else "ask", tx=True, link=True, expected=world.batch, doubt=relay.doubt
        )
    yield f"reads batch {world.batch}", _with(world, me, read)


def _look_ahead(world: World, me: int, relay: Relay, rules: Rules) -> Moves:
    """Read the batch: what was claimed ahead can follow it, if nobody has led in between."""
    text = f"reads batch {world.batch}"
    if relay.expected != world.batch and rules.read_again:
        yield f"{text}, and rolls back", _with(world, me, relay.rest())
    elif relay.link:
        yield text, _with(world, me, _on(relay))
    else:
        yield text, _with(world, me, relay._replace(at="ask", link=True))


def _on(relay: Relay) -> Relay:
    """Return the relay about to publish what it has claimed ahead."""
    return relay._replace(at="publish", hand=relay.ahead, ahead=())


def _ask(world: World, me: int, relay: Relay, rules: Rules) -> Moves:
    _, answer = ask(world.redis, relay.expected, relay.expected, (), about=relay.doubt, rules=rules)
    relay = relay._replace(doubt=())
    said = f"at batch {world.redis.batch}" if isinstance(answer, Added) else _said(answer)
    text = f"asks Redis where it stands: {said}"
    at = "claim" if isinstance(answer, Added) else "recover"
    if relay.ahead and at == "claim":
        yield text, _with(world, me, _on(relay))
        return
    if relay.ahead and rules.recover_empty_handed:
        yield f"{text}, and rolls back", _with(world, me, Relay(expected=relay.expected))
        return
    yield text, _with(world, me, relay._replace(at=at, hand=() if at == "claim" else answer))


def _claim(world: World, me: int, relay: Relay, rules: Rules) -> Moves:
    for retry in _retries(world):
        events = _due(world, me, rules, retry, skip=not rules.wait_for_rows)
        if not events:
            yield "finds nothing due", _with(world, me, relay.rest())
        else:
            yield from _wait(world, me, relay._replace(wants=events), rules)


def _retries(world: World) -> tuple[bool, ...]:
    """Return whether the refused events may be due: at any time."""
    return (True, False) if any(attempts for _, attempts in world.rows) else (True,)


def _wait(world: World, me: int, relay: Relay, rules: Rules) -> Moves:
    """Take the rows that the claim wants, or wait for who holds them."""
    got, whole = _taken(world, me, relay.wants)
    if not whole:
        waiting = relay._replace(at="wait", hand=got)
        if waiting != relay:
            text = f"claims {_names(event.id for event in relay.wants)}, gets {_names(event.id for event in got)}"
            yield f"{text}, and waits", _with(world, me, waiting)
        return
    if not got:
        yield "finds nothing due any more", _with(world, me, relay.rest())
        return
    claimed = relay._replace(at="publish", hand=got, wants=())
    if not rules.publish_first:
        ids = tuple(event.id for event in got)
        claimed = claimed._replace(at="commit", hand=Change(((relay.expected + 1, ids),), ids))
    yield f"claims {_names(event.id for event in got)}", _with(world, me, claimed)


def _publish(world: World, me: int, relay: Relay, rules: Rules) -> Moves:
    fit, _ = protocol.sift(relay.hand, {})
    redis, answer = ask(world.redis, relay.expected, relay.expected + 1, fit, world.bad, rules=rules)
    _check_that_none_passes(world, redis)
    text = f"publishes batch {relay.expected + 1}, {_names(event.id for event in fit)}: {_said(answer)}"
    world = _asked(world, redis)
    if not rules.publish_first:
        yield text, _with(world, me, relay.rest())
        return
    sent = relay._replace(hand=Sent(relay.hand, answer))
    yield text, _with(world, me, _read(sent, rules))
    if world.claims_late and rules.one_leader and not relay.ahead:
        yield f"{text}, as it will read", _with(world, me, sent._replace(at="claim ahead"))


def _publish_or_claim_ahead(world: World, me: int, relay: Relay, rules: Rules) -> Moves:
    yield from _publish(world, me, relay, rules)
    if world.claims_ahead and rules.one_leader and rules.publish_first and not relay.ahead:
        yield from _claim_ahead(world, me, relay, rules)


def _claim_ahead(world: World, me: int, relay: Relay, rules: Rules) -> Moves:
    """Claim what comes next, in a second transaction, while Redis works on the batch."""
    for retry in _retries(world):
        own = _in_hand(relay)
        events = _due(world, me, rules, retry, own, skip=not (rules.wait_for_rows and rules.wait_ahead))
        if events:
            yield from _wait_ahead(world, me, relay._replace(wants=events), rules)
        elif isinstance(relay.hand, Sent):
            yield "finds nothing to claim ahead, and reads the answer", _with(world, me, _read(relay, rules))


def _wait_ahead(world: World, me: int, relay: Relay, rules: Rules) -> Moves:
    got, whole = _taken(world, me, relay.wants)
    if whole:
        text = f"claims {_names(event.id for event in got)} ahead"
        claimed = relay._replace(at="publish", wants=(), ahead=got)
        yield text, _with(world, me, _read(claimed, rules))
        return
    waiting = relay._replace(at="wait ahead", ahead=got)
    if waiting != relay:
        text = f"claims {_names(event.id for event in relay.wants)} ahead"
        yield f"{text}, gets {_names(event.id for event in got)}, and waits", _with(world, me, waiting)
    if relay.tx and relay.at == "wait ahead" and rules.idle_timeout:
        yield (
            "has its first transaction ended by PostgreSQL: it is idle",
            _with(world, me, relay._replace(tx=False)),
        )


def _read(relay: Relay, rules: Rules) -> Relay:
    """Return the relay after it has read Redis's answer, if it has sent anything.

    What it has claimed ahead goes back, unless the batch is in Redis as a whole.
    """
    if not isinstance(relay.hand, Sent):
        return relay
    events, answer = relay.hand
    relay = relay._replace(wants=())
    if not isinstance(answer, Added):
        doubt = tuple(answer.lanes) if isinstance(answer, Gone) else ()
        return relay._replace(at="roll back", hand=() if rules.ask_again else answer, ahead=(), doubt=doubt)  # type: ignore[arg-type]
    change = settled(relay.expected, list(events), answer)
    whole = not answer.refused or not rules.refused_ends_ahead
    return relay._replace(at="commit", hand=change, ahead=relay.ahead if whole else ())


def _lead_on(world: World, me: int, relay: Relay, rules: Rules) -> Moves:
    """Lock the leader's row in the transaction that has claimed ahead."""
    if not relay.ahead:
        yield "finds that its transaction is gone", _with(world, me, relay.rest())
    elif not rules.lead_again:
        yield "goes on", _with(world, me, _on(relay)._replace(tx=True, unled=True))
    elif _leads(world.relays[1 - me]):
        yield "finds another leading, and rolls back", _with(world, me, relay.rest())
    else:
        yield (
            "locks the leader's row with what it has claimed ahead",
            _with(world, me, relay._replace(at="look", tx=True)),
        )


def settled(expected: int, events: list[Event], answer: Added) -> Change:
    published, refusals = protocol.settle(events, answer)
    dead = [refusal for refusal in refusals if protocol.is_dead(refusal, MAX_ATTEMPTS)]
    back = [refusal for refusal in refusals if refusal not in dead]
    return Change(
        batches=((expected + 1, tuple(event.id for event in published)),),
        deleted=tuple(event.id for event in events),
        back=tuple((event.id, event.attempts + bool(error)) for event, error in back),
        dead=tuple(event.id for event, _ in dead),
    )


def _check_that_none_passes(world: World, redis: Redis) -> None:
    """Raise Broken when a batch has brought an event past a refused one of its key."""
    new = {id for lane in redis.lanes for id in lane} - {id for lane in world.redis.lanes for id in lane}
    for id in new:
        for other, attempts in world.rows:
            if attempts and other < id and world.events[other].key == world.events[id].key:
                raise Broken(f"{_name(id)} has passed {_name(other)}, which was refused")


def _roll_back(world: World, me: int, relay: Relay, rules: Rules) -> Moves:
    """Give up the lock; the next step asks Redis first. (The broken rule keeps the answer in hand.)"""
    yield (
        "rolls back",
        _with(
            world,
            me,
            relay.rest()._replace(link=False, expected=relay.expected, hand=relay.hand, doubt=relay.doubt),
        ),
    )


def _recover(world: World, me: int, relay: Relay, rules: Rules) -> Moves:
    move = protocol.decide(relay.expected, relay.hand, replay=True)
    match move:
        case Adopt(batches):
            yield from _adopt(world, me, relay, rules, batches)
        case SendAgain(known):
            yield "sends again", _with(world, me, relay._replace(at="send again", hand=known))
        case Fill(lanes, stands):
            yield (
                "fills again",
                _with(world, me, relay._replace(at="fill", hand=Filling(tuple(lanes), stands))),
            )  # type: ignore[arg-type]
        case Bury(batch, reasons):
            ids = dict(world.journal).get(batch, ())
            dead = tuple(ids[place] for place in reasons if ids)
            buried = relay._replace(at="commit, then forget", hand=Change(dead=dead))
            yield f"buries {_names(dead)}", _with(world, me, buried)
        case _:
            raise AssertionError(move)


def _adopt(world: World, me: int, relay: Relay, rules: Rules, batches: Any) -> Moves:
    marks = {id for ids in batches.values() for id in ids}
    if not rules.adopt_by_ids:
        marks = {event.id for event in _due(world, me, rules, True)}
        batches = {max(batches): tuple(marks)}
    if not rules.one_leader and marks & _locked(world, me):
        return  # waits for the other's locks
    here = marks & {id for id, _ in world.rows}
    journal = tuple((n, tuple(id for id in ids if id in here)) for n, ids in sorted(batches.items()))
    claimed = {event.id for event in relay.ahead}
    hand = Change(batches=journal, deleted=tuple(sorted(here | claimed)))
    relay = relay._replace(ahead=())
    yield f"adopts {_names(sorted(here))}", _with(world, me, relay._replace(at="commit", hand=hand))


def _send_again(world: World, me: int, relay: Relay, rules: Rules) -> Moves:
    known = relay.hand
    if known >= relay.expected:
        if relay.ahead:
            world = _committed(world, Change(deleted=tuple(event.id for event in relay.ahead)))
        yield "commits", _with(world, me, Relay())
        return
    found = next(((number, ids) for number, ids in world.journal if number > known), None)
    following = protocol.send_next(known, relay.expected, found[0] if found else None)
    events = [world.events[id] for id in found[1]] if found else []
    redis, answer = ask(world.redis, known, following.number, events, world.bad, again=True, rules=rules)
    text = f"sends batch {following.number} again, {_names(event.id for event in events)}: {_said(answer)}"
    if isinstance(answer, Gone):
        filling = Filling(tuple(answer.lanes), known)  # type: ignore[arg-type]
        yield text, _with(world, me, relay._replace(at="fill", hand=filling))
        return
    if not isinstance(answer, Added):  # as when Redis has forgotten more meanwhile: the step fails
        yield text, _with(_asked(world, redis), me, Relay())
        return
    on = relay._replace(hand=relay.expected if answer.refused else following.number)
    if answer.refused and not rules.note_refusals:
        dead = tuple(events[place].id for place in (*answer.refused, *answer.held))
        on = relay._replace(at="commit", hand=Change(dead=dead))
    yield text, _with(_asked(world, redis), me, on)


def _fill(world: World, me: int, relay: Relay, rules: Rules) -> Moves:
    """Give Redis what a journal batch holds of a lane; at the end, tell it that each lane is whole."""
    lanes, stands, done, after = relay.hand
    left = [
        (number, lane, tuple(world.events[id] for id in ids))
        for number, ids in world.journal
        for lane in lanes
        if number <= stands and (number, lane) > done and any(_lane(world.events[id]) == lane for id in ids)
    ]
    end = stands + 1
    number, lane, events = (
        left or [(end, lane, ()) for lane in lanes if (end, lane) > done] or [(0, 0, ())]
    )[0]
    if not number:
        yield "commits", _with(world, me, Relay())
        return
    redis, answer = restore(
        world.redis, stands, lane, after[lane], number if events else 0, events, world.bad, rules
    )
    what = f"with {_names(event.id for event in events)} of batch {number}" if events else "for good"
    text = f"fills {LANES[lane]} {what}: {_said(answer)}"
    on = relay._replace(hand=relay.hand._replace(done=(number, lane), after=_put(after, lane, number)))
    if not isinstance(answer, Added):
        on = Relay()
    elif answer.refused:
        on = relay._replace(hand=relay.hand._replace(done=(end, max(lanes))))
        if not rules.note_refusals:
            on = relay._replace(
                at="commit", hand=Change(dead=tuple(events[place].id for place in answer.refused))
            )
    yield text, _with(_asked(world, redis), me, on)


def _commit(world: World, me: int, relay: Relay, rules: Rules) -> Moves:
    if relay.hand.batches and relay.expected != world.batch:
        yield "fails to commit: there is such a batch", _with(world, me, Relay())
        return
    if relay.unled and _leads(world.relays[1 - me]):
        yield "fails to commit: another has locked the leader's row", _with(world, me, relay.rest())
        return
    world = _committed(world, relay.hand)
    if relay.ahead:
        known = relay.expected + len(relay.hand.batches)
        on = Relay(at="lead on", link=relay.link, expected=known, ahead=relay.ahead)
        yield "commits", _with(world, me, on)
    elif rules.publish_first or relay.at != "commit":
        yield "commits", _with(world, me, relay.rest())
    else:
        events = tuple(world.events[id] for id in relay.hand.deleted)
        yield "commits", _with(world, me, relay._replace(at="publish", tx=False, hand=events))


def _commit_then_forget(world: World, me: int, relay: Relay, rules: Rules) -> Moves:
    after = Relay(at="forget", link=relay.link, hand=world.redis.refused)
    yield "commits", _with(_committed(world, relay.hand), me, after)


def _forget(world: World, me: int, relay: Relay, rules: Rules) -> Moves:
    if world.redis.refused == relay.hand:
        world = _asked(world, world.redis._replace(refused=None))
    yield "has Redis forget the refusal", _with(world, me, Relay())


STATEMENTS = {
    "idle": _begin,
    "look": _look,
    "ask": _ask,
    "claim": _claim,
    "wait": _wait,
    "publish": _publish_or_claim_ahead,
    "claim ahead": _claim_ahead,
    "wait ahead": _wait_ahead,
    "lead on": _lead_on,
    "roll back": _roll_back,
    "recover": _recover,
    "send again": _send_again,
    "fill": _fill,
    "commit": _commit,
    "commit, then forget": _commit_then_forget,
    "forget": _forget,
}
IN_TRANSACTION = {"look", "claim", "wait", "recover", "commit", "commit, then forget"}
ON_CONNECTION = {"ask", "publish", "send again", "fill", "forget"}
LANES = ("primary", "backfill")


# -- everything else that happens -----------------------------------------------------------------------------


def steps(world: World, rules: Rules) -> Iterator[tuple[int, str, World]]:
    """Yield what relays that nobody disturbs, and the service, can do: who, what, and the world after it."""
    if world.written < len(world.events):
        event = world.written
        rows = (*world.rows, (event, 0))
        text = f"the service commits {_name(event)}"
        yield NOBODY, text, _kept(world)._replace(written=event + 1, rows=rows)
    if world.bad != NOBODY:
        yield NOBODY, f"Redis can take {_name(world.bad)} again", world._replace(bad=NOBODY)
    if world.journal and world.journal[0][0] <= _safe(world, rules):
        text = f"batch {world.journal[0][0]} is purged from the journal"
        yield NOBODY, text, world._replace(journal=world.journal[1:])
    if world.orphans:
        text = "PostgreSQL ends the second transaction of the relay that crashed"
        yield NOBODY, text, world._replace(orphans=())
    for me in (0, 1):
        for text, after in _moves(world, me, rules):
            yield me, text, after


def _safe(world: World, rules: Rules) -> int:
    """Return the last batch that the journal need not keep."""
    if not rules.journal_outlives_loss:
        return world.batch
    states = (world.redis, *world.past)
    if any(_is_lost(state, lane) for state in states for lane in (0, 1)):
        return 0  # a lane is filled from all that there is
    noted = [state.refused[0] - 1 for state in states if state.refused]
    return min([world.batch, *(state.batch for state in states), *noted])


def faults(world: World, rules: Rules) -> Iterator[tuple[int, str, World]]:
    """Yield what can go wrong: who, what, and the world after it."""
    if world.spoils:
        for id in range(len(world.events)):
            spoilt = world._replace(spoils=0, bad=id)
            yield NOBODY, f"Redis would refuse {_name(id)} from now on", spoilt
    if world.past:
        yield NOBODY, "Redis persists all that it has", world._replace(past=())
        for state in {*world.past}:
            text = f"Redis crashes, and is back at batch {state.batch}"
            relays = tuple(relay._replace(link=False) for relay in world.relays)
            forgotten = world._replace(redis=state, past=(), losses=world.losses - 1, relays=relays)
            yield NOBODY, text, forgotten
    if world.deletions:
        for lane, entries in enumerate(world.redis.lanes):
            if entries:
                yield NOBODY, f"{LANES[lane]} is deleted", _deleted(world, lane)
    for standby in {*world.standby}:
        text = f"PostgreSQL fails over, and is back at batch {standby.batch}"
        yield NOBODY, text, _failed_over(world, standby)
    for me, relay in enumerate(world.relays):
        if relay.at != "idle" and world.crashes:
            crashed = _with(world._replace(crashes=world.crashes - 1), me, Relay())
            yield me, "crashes", crashed
            if relay.ahead:
                held = tuple(sorted({*world.orphans, *(event.id for event in relay.ahead)}))
                yield me, "crashes, and its second transaction lives on", crashed._replace(orphans=held)
        if world.freezes:
            frozen = world._replace(freezes=world.freezes - 1)
            for text, ended in _endings(relay):
                yield me, f"freezes, until PostgreSQL has ended {text}", _with(frozen, me, ended)
        elif relay.ahead and not relay.tx and relay.at != "lead on":
            # whose first transaction PostgreSQL has ended
            text = "is still frozen when PostgreSQL ends its second transaction, too"
            yield me, text, _with(world, me, _ended(relay, ahead=True))


def _deleted(world: World, lane: int) -> World:
    """Return the world without what was in a lane. What the journal does not have of it, and will not, is gone."""
    known = {id for _, ids in world.journal for id in ids} | {id for id, _ in world.rows}
    gone = tuple(sorted({*world.gone} | {*world.redis.lanes[lane]} - known))
    deleted = world.redis._replace(lanes=_put(world.redis.lanes, lane, ()))
    return _asked(world, deleted)._replace(deletions=world.deletions - 1, gone=gone)


def _endings(relay: Relay) -> Iterator[tuple[str, Relay]]:
    """Yield which of a relay's transactions can have ended, and the relay then."""
    one = relay.at in ("look", "ask")  # it has locked the leader's row in the transaction that claimed ahead
    if relay.tx:
        yield "its transaction", _ended(relay, ahead=one)._replace(tx=False)
    if relay.ahead and not one:
        yield "its second transaction", _ended(relay, ahead=True)
        if relay.tx:
            yield "both its transactions", _ended(relay, ahead=True)._replace(tx=False)


def _ended(relay: Relay, *, ahead: bool) -> Relay:
    """Return the relay, without what it has claimed `ahead` if that transaction has ended."""
    if ahead and relay.at == "wait ahead":
        relay = relay._replace(at="claim ahead" if isinstance(relay.hand, Sent) else "publish", wants=())
    return relay._replace(ahead=()) if ahead else relay


# -- the promise ----------------------------------------------------------------------------------------------


def check(world: World) -> None:
    """Raise Broken when the promise is, in this state."""
    redis, events = world.redis, world.events
    seen = [id for lane in redis.lanes for id in lane]
    for id in {*seen}:
        if seen.count(id) > 1:
            raise Broken(f"{_name(id)} is in a stream twice")
    for lane in redis.lanes:
        for place, id in enumerate(lane):
            if any(other > id and events[other][1:3] == events[id][1:3] for other in lane[:place]):
                raise Broken(f"{_name(id)} comes after a later event of its key and priority")
    noted = _noted(world)
    journal = {
        id
        for number, ids in world.journal
        for id in ids
        if number > redis.batch or _is_lost(redis, _lane(events[id]))
    }
    settled = {*seen, *world.dead, *world.gone}
    waiting = {id for id, _ in world.rows} | journal | noted
    for id in range(world.written):
        if id not in settled and id not in waiting:
            raise Broken(f"{_name(id)} is lost")
    told = dict(redis.ids)
    for number, ids in world.journal:
        if number in told and {*ids} - {*told[number]} - {*world.dead} - noted:
            raise Broken(
                f"batch {number} is {_names(told[number])} in Redis, and {_names(ids)} in PostgreSQL"
            )
        if number in told and {*told[number]} - {*ids} - {*world.gone}:
            raise Broken(
                f"batch {number} is {_names(told[number])} in Redis, and {_names(ids)} in PostgreSQL"
            )


def _is_lost(redis: Redis, lane: int) -> bool:
    return bool(redis.filled[lane]) or _went_back(redis, lane)


def _noted(world: World) -> set[int]:
    """Return the events that are to be dead letters."""
    if not world.redis.refused:
        return set()
    number, refused, held = world.redis.refused
    ids = dict(world.journal).get(number, ())
    return {ids[place] for place in (*refused, *held) if ids}


def is_settled(world: World) -> bool:
    """Return whether every event is in a stream or a dead letter, and nobody has anything in hand."""
    settled = {id for lane in world.redis.lanes for id in lane} | {*world.dead} | {*world.gone}
    # That a lane is lost is found out with the next event for it.
    settled |= {
        id for _, ids in world.journal for id in ids if _is_lost(world.redis, _lane(world.events[id]))
    }
    idle = all(relay.at == "idle" for relay in world.relays)
    return idle and not world.rows and len(settled) == len(world.events)


# -- in words -------------------------------------------------------------------------------------------------


def _name(id: int) -> str:
    return f"e{id + 1}"


def _names(ids: Any) -> str:
    return " ".join(map(_name, ids)) or "nothing"


def _said(answer: Answer) -> str:
    match answer:
        case Added(refused):
            return "added" if not refused else "refused in part"
        case Ahead(batch):
            return f"Redis stands ahead, at batch {batch}"
        case Behind(batch):
            return f"Redis stands behind, at batch {batch}"
        case Gone(lanes):
            return " and ".join(f"{LANES[lane]} is gone" for lane in lanes)  # type: ignore[call-overload]
    return "Redis has refusals to tell of first"
