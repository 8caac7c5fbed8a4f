"""A million hostile datagrams and frames: none accepted, nothing raised, all counted.

``python -m benchmarks.fuzz --datagrams 1000000 --json``. FINs: random bytes, truncated and extended
ones, real ones with bits changed, real ones replayed, real ones of another key or in another
sender's name. Frames into a SequencerCore and into a DomainGate: random, truncated, mutated, wrong
epochs and classes. Half of each. Accepted is what should not have been.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from typing import Any

from intentd.core.errors import WireError
from intentd.core.flows.fin import FinSigner, FinVerifier, sender_key
from intentd.core.flows.policy import ClassPolicy, DomainPolicy
from intentd.core.flows.turn import wire
from intentd.core.flows.turn.domain import DomainGate
from intentd.core.flows.turn.sequencer import SequencerCore, SequencerSettings
from intentd.core.flows.turn.wire import Run

KEY = bytes(range(32))
DOMAIN = wire.name_id("link")
EPOCH = 50
RUNS = (Run(0, 1, 4), Run(1, 9, 1, True))


def fuzz_fins(count: int, rng: random.Random) -> dict[str, Any]:
    """count hostile datagrams for one verifier, with a genuine one among every thousand."""
    verifier = FinVerifier(KEY, max_senders=64)
    genuine = FinSigner.from_domain_key(KEY, "honest", 1)
    thief = FinSigner(sender_key(KEY, wire.name_id("thief")), "thief", 1)
    thief.sender = genuine.sender
    stranger = FinSigner.from_domain_key(bytes(32), "honest", 1)
    sent = [genuine.sign(DOMAIN, EPOCH, RUNS)]
    assert verifier.accept(sent[0]) is not None
    accepted, honest = 0, 1
    for number in range(count):
        kind = rng.randrange(7)
        original = rng.choice(sent)
        if kind == 0:
            datagram = rng.randbytes(rng.randrange(0, 200))
        elif kind == 1:
            datagram = original[: rng.randrange(len(original))]
        elif kind == 2:
            datagram = original + rng.randbytes(rng.randrange(1, 40))
        elif kind == 3:
            changed = bytearray(original)
            for at in rng.sample(range(len(changed)), rng.randrange(1, 4)):
                changed[at] ^= rng.randrange(1, 256)
            datagram = bytes(changed)
        elif kind == 4:
            datagram = original  # replayed
        elif kind == 5:
            datagram = thief.sign(DOMAIN, EPOCH, RUNS)
        else:
            datagram = stranger.sign(DOMAIN, EPOCH, RUNS)
        accepted += verifier.accept(datagram) is not None
        if number % 1000 == 999:
            sent.append(genuine.sign(DOMAIN, EPOCH, RUNS))
            honest += verifier.accept(sent[-1]) is not None
    return {
        "datagrams": count,
        "accepted": accepted,
        "honest_accepted": honest,
        "honest_sent": len(sent),
        "dropped": verifier.dropped,
        "counted": sum(verifier.dropped.values()) == count - accepted,
        "senders": len(verifier),
    }


def fuzz_frames(count: int, rng: random.Random) -> dict[str, Any]:
    """count hostile frames into a sequencer with one honest member, and into that member."""
    core = SequencerCore(
        SequencerSettings(max_members=16, max_domains=4), epoch=EPOCH, previous=0, now=0.0
    )
    core.tick(10.0)
    hello = wire.Hello("link", "honest", 1, 0, 1, 0)
    welcome = core.receive(b"honest", wire.encode(hello), 10.0)
    assert welcome is not None
    policy = DomainPolicy("link", 1e9, (ClassPolicy(math.inf, 1.0, sequencing="global"),))
    gate = DomainGate(policy, name="honest", boot=1)
    gate.connected(True, now=10.0)
    gate.poll_outbox()
    gate.handle(wire.decode(welcome), now=10.0)
    seeds = [
        wire.encode(message)
        for message in (
            wire.TicketRequest(DOMAIN, EPOCH, 0, 1, 1, 0),
            wire.Heartbeat(DOMAIN, EPOCH, 2, 0, RUNS),
            wire.Probe(DOMAIN, EPOCH, 0, 1),
            wire.Finished(DOMAIN, EPOCH, RUNS),
            wire.Goodbye(DOMAIN, EPOCH),
            wire.Tickets(DOMAIN, EPOCH, 0, 1, 1, 1, 0),
            wire.State(DOMAIN, EPOCH, 0, 1, 5, 90, 3, 4, 8),
            wire.Welcome(DOMAIN, EPOCH + 1, 1, 1000, 100, 0, RUNS),
            hello,
        )
    ]
    released = refused = 0
    for _ in range(count):
        kind = rng.randrange(4)
        if kind == 0:
            frame = rng.randbytes(rng.randrange(0, 120))
        elif kind == 1:
            frame = bytes((rng.randrange(24), rng.randrange(4))) + rng.randbytes(rng.randrange(60))
        else:
            changed = bytearray(rng.choice(seeds))
            for _ in range(rng.randrange(1, 4)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            frame = bytes(changed[: rng.randrange(1, len(changed) + 1)] if kind == 2 else changed)
        # strangers' frames: the honest member's connection is its own
        core.receive(b"stranger-%d" % rng.randrange(50), frame, 10.0)
        try:
            message = wire.decode(frame)
        except WireError:
            refused += 1
            continue
        released += len(gate.handle(message, now=10.0))
    status = core.status()
    return {
        "frames": count,
        "undecodable": refused,
        "released": released,
        "ids_given_to_strangers_of_the_honest_domain": status["domains"]["link"]["classes"]
        .get("0", {})
        .get("issued", 0),
        "members": sum(len(domain["members"]) for domain in status["domains"].values()),
        "domains": len(status["domains"]),
        "sessions": status["sessions"],
        "counts": status["counts"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datagrams", type=int, default=1_000_000, help="FINs and frames together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    started = time.monotonic()
    half = arguments.datagrams // 2
    print(f"{half} FINs", file=sys.stderr)
    fins = fuzz_fins(half, random.Random(arguments.seed))
    print(f"{half} frames", file=sys.stderr)
    frames = fuzz_frames(half, random.Random(arguments.seed + 1))
    holds = (
        fins["accepted"] == 0
        and fins["counted"]
        and fins["honest_accepted"] == fins["honest_sent"]
        and frames["released"] == 0
    )
    document = {
        "fins": fins,
        "frames": frames,
        "seconds": round(time.monotonic() - started, 1),
        "holds": holds,
    }
    if arguments.json:
        print(json.dumps(document))
    else:
        for name, value in (*fins.items(), *frames.items()):
            print(f"{name:<45}{value}")
        print("holds" if holds else "DOES NOT HOLD")
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
