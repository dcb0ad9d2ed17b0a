"""`measured`: the device under our feet, from an engine that ran steps on it."""

import random
import time

from tokenmill.engine.engine import Engine
from tokenmill.engine.planning.device import Device, EngineShape
from tokenmill.engine.planning.load import Lengths
from tokenmill.engine.planning.step_cost import StepCost
from tokenmill.engine.scheduler import Policy
from tokenmill.producer.params import SamplingParams

#: Requests of the load that is run to learn from.
REQUESTS = 24
#: How long it takes, and the fewest steps that tell anything.
SECONDS, LEAST_STEPS = 10.0, 24


def measured(engine: Engine, lengths: Lengths, *, policy: Policy) -> Device:
    """What steps cost here, learnt from a load like the planned one."""
    draw = random.Random(0)
    ends = time.perf_counter() + SECONDS
    for number, (prompt, output) in enumerate(lengths.draw()[:REQUESTS]):
        room = engine.max_model_len - 1
        prompt_ids = [draw.randrange(engine.vocab_size) for _ in range(min(prompt, room))]
        sampling = SamplingParams(max_tokens=output, ignore_eos=True)
        engine.add(f"plan-{number}", prompt_ids, sampling, seed=number)
    steps = 0
    while engine.has_work and (time.perf_counter() < ends or steps < LEAST_STEPS):
        engine.step()
        steps += 1
    for number in range(REQUESTS):
        engine.abort(f"plan-{number}")
    scheduler = engine.scheduler
    scheduler.cost.refit()
    fit = scheduler.cost.fit
    pool = scheduler.pool
    return Device(
        cost=StepCost.of_fit(fit),
        engine=EngineShape(
            token_budget=scheduler.token_budget,
            max_num_seqs=scheduler.max_num_seqs,
            kv_tokens=pool.num_blocks * pool.block_size,
            block_size=pool.block_size,
            policy=policy,
            max_step_s=scheduler.max_step_s,
        ),
        device=f"{engine.model_name} here",
        source=f"{fit.num_steps} steps, median error {fit.relative_error:.1%}",
    )
