"""`Norm`: RMSNorm, or layer norm where there is a bias, alone or behind a residual addition."""

import torch

from tokenmill.kernels import ops


class Norm:
    """Callable on rows [T, H]; the parameters are float32 whatever the model computes in."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> None:
        self.weight = weight
        self.bias = bias
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return ops.rms_norm(x, self.weight, self.eps)
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(
        self, x: torch.Tensor, residual: torch.Tensor, post: "Norm | None" = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the normed sum and the sum, both [T, H]; `residual` may have become the sum.

        `post`: what norms `x` before it is added; RMSNorm, as this one then.
        """
        if self.bias is None:
            weight = None if post is None else post.weight
            return ops.add_rms_norm(x, residual, self.weight, self.eps, post=weight)
        return ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps)

    def add_normed(
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of `residual` and of `x` normed by this RMSNorm, twice."""
        return ops.add_rms_norm(x, residual, None, self.eps, post=self.weight)

    def scaled(self, x: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
        """RMSNorm of rows [T, W] that are parts of longer ones, whose mean square [T] is given."""
        scale = torch.rsqrt(mean_square + self.eps)[:, None]
        return (x.float() * scale * self.weight).to(x.dtype)
