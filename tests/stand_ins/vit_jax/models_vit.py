"""A stand-in for the Vision Transformer: patches, a class token, positions, pre-norm blocks, a head on the token."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

__all__ = ["VisionTransformer"]

zeros = nn.initializers.zeros


class MlpBlock(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(nn.Dense(self.width)(x))  # the first to be made is Dense_0
        return nn.Dense(x.shape[-1])(hidden)


class Block(nn.Module):
    heads: int
    mlp: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(y, y)
        return x + MlpBlock(self.mlp)(nn.LayerNorm()(x))


class Positions(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + self.param("pos_embedding", zeros, (1, *x.shape[1:]))


class Encoder(nn.Module):
    num_layers: int
    num_heads: int
    mlp_dim: int
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x):
        x = Positions(name="posembed_input")(x)
        for number in range(self.num_layers):
            x = Block(self.num_heads, self.mlp_dim, name=f"encoderblock_{number}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class Same(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x


class VisionTransformer(nn.Module):
    num_classes: int
    hidden_size: int
    patches: Any
    transformer: Any

    @nn.compact
    def __call__(self, x, train):
        assert not train
        size = self.patches.size
        x = nn.Conv(self.hidden_size, size, size, "VALID", name="embedding")(x)
        token = self.param("cls", zeros, (1, 1, self.hidden_size))
        x = jnp.concatenate([jnp.repeat(token, len(x), 0), x.reshape(len(x), -1, self.hidden_size)], 1)
        x = Encoder(**self.transformer, name="Transformer")(x)
        x = Same(name="pre_logits")(x[:, 0])
        return nn.Dense(self.num_classes, name="head")(x) if self.num_classes else x
