"""`ModelSpec`: what distinguishes the models that the one ragged decoder runs."""

from dataclasses import dataclass

from tokenmill.engine.models.rope import Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESpec:
    """A mixture of experts: softmax over all, then the best `top_k` for each token."""

    num_experts: int
    top_k: int
    intermediate_size: int
    #: The weights of the chosen sum to one, which is the same as choosing before the softmax.
    normalize: bool
    #: Inner size of the expert that serves every token behind a sigmoid gate; 0: there is none.
    shared_intermediate_size: int = 0
    #: For each layer whether it has experts, rather than one MLP.
    layers: tuple[bool, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shapes and switches of a decoder; sizes in elements, defaults are Llama's."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    tied_embeddings: bool
    attention_scale: float
    #: Rotary positions of each layer; None: the layer has none.
    ropes: tuple[Rope | None, ...]
    #: Tokens that each layer's attention sees, the query's own included; None: all.
    windows: tuple[int | None, ...]

    #: Rows of the table of learned positions that come before position 0; None: no such table.
    position_offset: int | None = None
    embedding_scale: float = 1.0

    #: RMSNorm, or layer norm with bias.
    layer_norm: bool = False
    #: Added to the stored weight of every RMSNorm.
    norm_offset: float = 0.0
    #: Norms before attention and MLP, and of their outputs.
    pre_norm: bool = True
    post_norm: bool = False
    #: Attention and MLP read the same residual; with one norm for both, or with two.
    parallel: bool = False
    shared_norm: bool = False

    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False

    #: Norm of queries and keys before the rotation: "head" for each, "whole" over all heads.
    qk_norm: str = ""
    attention_softcap: float | None = None
    logit_softcap: float | None = None

    #: One of `kernels.reference.ACTIVATIONS`; gated: of one half of a linear, times the other.
    activation: str = "silu"
    gated: bool = True
    moe: MoESpec | None = None

    @property
    def kv_token_elements(self) -> int:
        """Elements of keys and values of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def window(self) -> int | None:
        """Tokens that a query sees in any layer, its own included; None: all, in some layer."""
        windows = [window for window in self.windows if window is not None]
        return max(windows) if len(windows) == self.num_layers else None

    @property
    def q_size(self) -> int:
        """Width of the queries of all heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the keys of all heads."""
        return self.num_kv_heads * self.head_dim
