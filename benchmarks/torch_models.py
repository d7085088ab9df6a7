"""U-ViT and Large-DiT in plain PyTorch, for timing and comparison: diffusers has neither.

Written from their descriptions (baofff/U-ViT `libs/uvit_t2i.py`, Large-DiT-T2I `models/model.py`), with the names of
their state dicts: `scaling_dit.interop.to_state_dict` fills them strictly, and both sides compute the same numbers.
Attention is `scaled_dot_product_attention`, as a PyTorch user would have it. Images are [B, C, H, W].
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import nn


def timestep_embedding(timesteps: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoids [B, dim] of timesteps [B], cosines first."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=timesteps.device) / (dim // 2))
    angles = timesteps[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """q [B, T, N, H], k and v [B, S, K, H], mask [B, S] -> [B, T, N * H]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    shown = None if mask is None else mask[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=shown, enable_gqa=k.shape[1] != q.shape[1])
    return out.transpose(1, 2).flatten(2)


class UViTAttention(nn.Module):
    """Self-attention with one product for q, k and v."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.proj(attend(q, k, v))


class UViTMlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class UViTBlock(nn.Module):
    """Pre-norm block that merges a long skip first."""

    def __init__(self, hidden: int, heads: int, skip: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attn, self.mlp = UViTAttention(hidden, heads), UViTMlp(hidden)
        self.skip_linear = nn.Linear(2 * hidden, hidden) if skip else None

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A convolution with stride `patch`: [B, C, H, W] -> [B, T, D]."""

    def __init__(self, channels: int, hidden: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden, patch, patch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Patches in row-major order."""
        return self.proj(x).flatten(2).transpose(1, 2)


class UViT(nn.Module):
    """U-ViT for text to image: time, text and image tokens in one sequence."""

    def __init__(
        self, hidden: int, depth: int, heads: int, patch: int, channels: int, text_dim: int, tokens: int
    ) -> None:
        super().__init__()
        self.hidden, self.patch = hidden, patch
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, hidden))
        self.patch_embed = PatchEmbed(channels, hidden, patch)
        self.context_embed = nn.Linear(text_dim, hidden)
        self.in_blocks = nn.ModuleList(UViTBlock(hidden, heads, False) for _ in range(depth // 2))
        self.mid_block = UViTBlock(hidden, heads, False)
        self.out_blocks = nn.ModuleList(UViTBlock(hidden, heads, True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(hidden)
        self.decoder_pred = nn.Linear(hidden, patch**2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W], [B], [B, L, E] -> [B, C, H, W]."""
        height, width = (side // self.patch for side in x.shape[2:])
        time = timestep_embedding(timesteps, self.hidden).to(text.dtype)[:, None]
        tokens = torch.cat([time, self.context_embed(text), self.patch_embed(x)], dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            tokens = block(tokens)
            skips.append(tokens)
        tokens = self.mid_block(tokens)
        for block in self.out_blocks:
            tokens = block(tokens, skips.pop())
        patches = self.decoder_pred(self.norm(tokens)[:, 1 + text.shape[1] :])
        patches = patches.unflatten(1, (height, width)).unflatten(-1, (self.patch, self.patch, -1))
        image = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return self.final_layer(image)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a scale."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-5)


def rotate(x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding of interleaved pairs: x [B, T, N, H], cos and sin [T, 1, H / 2]."""
    cos, sin = cos_sin
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)


class LargeDiTAttention(nn.Module):
    """Self-attention with rotary positions, plus gated attention to the text from the same queries."""

    def __init__(self, hidden: int, heads: int, text_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.wk_y, self.wv_y = (nn.Linear(text_dim, hidden, bias=False) for _ in range(2))
        self.q_norm, self.k_norm, self.ky_norm = (nn.LayerNorm(hidden) for _ in range(3))
        self.gate = nn.Parameter(torch.zeros(heads))

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        text: torch.Tensor,
        text_mask: torch.Tensor,
    ) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        split = (self.heads, -1)
        q = rotate(self.q_norm(self.wq(x)).unflatten(-1, split), rotary)
        k = rotate(self.k_norm(self.wk(x)).unflatten(-1, split), rotary)
        out = attend(q, k, self.wv(x).unflatten(-1, split))
        k_text = self.ky_norm(self.wk_y(text)).unflatten(-1, split)
        from_text = attend(q, k_text, self.wv_y(text).unflatten(-1, split), text_mask)
        gated = from_text.unflatten(-1, split) * self.gate.tanh()[:, None]
        return self.wo(out + gated.flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        width = 256 * math.ceil(8 * hidden // 3 / 256)
        self.w1, self.w3 = (nn.Linear(hidden, width, bias=False) for _ in range(2))
        self.w2 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LargeDiTBlock(nn.Module):
    """adaLN-Zero block: attention and SwiGLU, each shifted, scaled and gated."""

    def __init__(self, hidden: int, heads: int, text_dim: int, condition: int) -> None:
        super().__init__()
        self.attention = LargeDiTAttention(hidden, heads, text_dim)
        self.feed_forward = FeedForward(hidden)
        self.attention_norm, self.ffn_norm = RMSNorm(hidden), RMSNorm(hidden)
        self.attention_y_norm = RMSNorm(text_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition, 6 * hidden))

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        text: torch.Tensor,
        text_mask: torch.Tensor,
        c: torch.Tensor,
    ) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        attended = self.attention(
            self.attention_norm(x) * (1 + scale1) + shift1, rotary, self.attention_y_norm(text), text_mask
        )
        x = x + gate1 * attended
        return x + gate2 * self.feed_forward(self.ffn_norm(x) * (1 + scale2) + shift2)


class LargeDiT(nn.Module):
    """Large-DiT for text to image, with an end-of-line token after each row of patches."""

    def __init__(self, hidden: int, depth: int, heads: int, patch: int, channels: int, text_dim: int) -> None:
        super().__init__()
        condition = min(hidden, 1024)
        self.patch, self.channels, self.head_size = patch, channels, hidden // heads
        self.eol_token = nn.Parameter(torch.zeros(hidden))
        self.x_embedder = nn.Linear(patch**2 * channels, hidden)
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, condition), nn.SiLU(), nn.Linear(condition, condition))}
        )
        self.cap_embedder = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, condition))
        self.layers = nn.ModuleList(LargeDiTBlock(hidden, heads, text_dim, condition) for _ in range(depth))
        self.final_layer = nn.ModuleDict(
            {
                "linear": nn.Linear(hidden, patch**2 * channels),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(condition, 2 * hidden)),
            }
        )

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor
    ) -> torch.Tensor:
        """[B, C, H, W], [B], [B, L, E], [B, L] -> [B, C, H, W]."""
        batch, p = len(x), self.patch
        rows, columns = (side // p for side in x.shape[2:])
        patches = x.unflatten(2, (rows, p)).unflatten(4, (columns, p)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        # [B, rows, columns, D]
        tokens = self.x_embedder(patches)
        ends = self.eol_token.expand(batch, rows, 1, -1)
        tokens = torch.cat([tokens, ends], dim=2).flatten(1, 2)
        positions = torch.arange(tokens.shape[1], device=x.device)[:, None]
        half = torch.arange(0, self.head_size, 2, device=x.device) / self.head_size
        angles = (positions * 10000.0**-half)[:, None]
        rotary = (angles.cos().to(tokens.dtype), angles.sin().to(tokens.dtype))
        shown = text_mask[..., None].to(text.dtype)
        pooled = (text * shown).sum(1) / shown.sum(1)
        time = self.t_embedder["mlp"](timestep_embedding(timesteps, 256).to(text.dtype))
        c = time + self.cap_embedder(pooled)
        for layer in self.layers:
            tokens = layer(tokens, rotary, text, text_mask, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, dim=-1)
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift
        out = self.final_layer["linear"](normed).unflatten(1, (rows, columns + 1))[:, :, :columns]
        out = out.unflatten(-1, (p, p, self.channels)).permute(0, 5, 1, 3, 2, 4)
        return out.flatten(4, 5).flatten(2, 3)
