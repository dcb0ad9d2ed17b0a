"""`EngineStats`: what an engine has done, and how full it is. Standard library only."""

from dataclasses import dataclass

from tokenmill.engine.cost_model import CostFit


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters since the start, and the state of now."""

    num_steps: int
    #: Tokens that went through the model, prompts and outputs.
    num_computed_tokens: int
    #: Tokens of all sequences when they were admitted (again, after a preemption) ...
    num_admitted_tokens: int
    #: ... and those of them that the prefix cache held.
    num_cached_tokens: int
    num_preemptions: int
    num_waiting: int
    num_running: int
    num_blocks: int
    #: Blocks that can be allocated, those of the prefix cache that nobody uses included.
    num_free_blocks: int
    #: Blocks that the prefix cache can find, in use or not.
    num_cached_blocks: int
    token_budget: int
    cost: CostFit

    @property
    def hit_rate(self) -> float:
        """Share of the admitted tokens that was in the prefix cache."""
        return self.num_cached_tokens / max(self.num_admitted_tokens, 1)
