"""Images as tokens: where an element of an image [B, C, H, W] lies in tokens [B, T, C*p*p], and the copy between the two.

The model's input orders the values of a patch as a convolution's weight does (channel, row, column); its output as the paper's
code does (row, column, channel).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

ELEMENTS = 1024  # of a program


@triton.jit
def patch_offset(token, grid_h, grid_w, channels, PATCH: tl.constexpr):
    """Element offset in the image batch of each token's first pixel, in the first channel; 64-bit."""
    tokens = grid_h * grid_w
    sample = (token // tokens).to(tl.int64)
    row, column = token % tokens // grid_w, token % grid_w  # grid_w divides tokens
    return sample * (tokens * channels * PATCH * PATCH) + (row * (grid_w * PATCH) + column) * PATCH


@triton.jit
def pixel_offset(feature, grid_h, grid_w, PATCH: tl.constexpr):
    """Element offset of a patch's values, in the order (channel, row, column), from its first pixel.

    PATCH of them lie side by side, at a multiple of PATCH: loads and stores are that wide.
    """
    plane = grid_h * grid_w * (PATCH * PATCH)
    channel, row, column = feature // (PATCH * PATCH), feature // PATCH % PATCH, feature % PATCH
    return channel * plane + row * (grid_w * PATCH) + column


@triton.jit
def channel_last(feature, channels, PATCH: tl.constexpr):
    """Where the value that is at ``feature`` in the order (channel, row, column) is in the order (row, column, channel)."""
    return feature % (PATCH * PATCH) * channels + feature // (PATCH * PATCH)


@triton.jit
def rearrange_kernel(
    source_ptr,
    destination_ptr,
    grid_h,
    grid_w,
    channels,
    sample_size,
    blocks,
    PATCH: tl.constexpr,
    CHANNEL_LAST: tl.constexpr,
    TO_IMAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = (tl.program_id(0) // blocks).to(tl.int64) * sample_size
    image_index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    width, height = grid_w * PATCH, grid_h * PATCH
    x, y, channel = image_index % width, image_index // width % height, image_index // (width * height)
    pixel = y % PATCH * PATCH + x % PATCH
    if CHANNEL_LAST:
        feature = pixel * channels + channel
    else:
        feature = channel * (PATCH * PATCH) + pixel
    token_index = (y // PATCH * grid_w + x // PATCH) * (channels * PATCH * PATCH) + feature
    mask = image_index < sample_size
    if TO_IMAGE:
        value = tl.load(source_ptr + sample + token_index, mask=mask)
        tl.store(destination_ptr + sample + image_index, value, mask=mask)
    else:
        value = tl.load(source_ptr + sample + image_index, mask=mask)
        tl.store(destination_ptr + sample + token_index, value, mask=mask)


def to_tokens(image: Tensor, patch_size: int, channel_last: bool) -> Tensor:
    """[B, C, h*p, w*p] -> [B, h*w, C*p*p], a patch's values as (row, column, channel) or else (channel, row, column)."""
    batch, channels, height, width = image.shape
    grid = (height // patch_size, width // patch_size)
    tokens = image.new_empty(batch, grid[0] * grid[1], channels * patch_size**2)
    _rearrange(image, tokens, grid, channels, patch_size, channel_last, to_image=False)
    return tokens


def to_image(tokens: Tensor, grid: tuple[int, int], patch_size: int, channel_last: bool) -> Tensor:
    """The inverse of ``to_tokens``: [B, h*w, C*p*p] -> [B, C, h*p, w*p] for the grid (h, w)."""
    channels = tokens.shape[2] // patch_size**2
    image = tokens.new_empty(image_shape(tokens, grid, patch_size, tokens.shape[2]))
    _rearrange(tokens, image, grid, channels, patch_size, channel_last, to_image=True)
    return image


def image_shape(tokens: Tensor, grid: tuple[int, int], patch_size: int, features: int) -> tuple[int, ...]:
    h, w = grid
    return len(tokens), features // patch_size**2, h * patch_size, w * patch_size


def _rearrange(
    source: Tensor,
    destination: Tensor,
    grid: tuple[int, int],
    channels: int,
    patch_size: int,
    channel_last: bool,
    to_image: bool,
) -> None:
    sample_size = grid[0] * grid[1] * channels * patch_size**2
    blocks = triton.cdiv(sample_size, ELEMENTS)
    launch(
        rearrange_kernel,
        len(source) * blocks,
        source_ptr=source.contiguous(),
        destination_ptr=destination,
        grid_h=grid[0],
        grid_w=grid[1],
        channels=channels,
        sample_size=sample_size,
        blocks=blocks,
        PATCH=patch_size,
        CHANNEL_LAST=channel_last,
        TO_IMAGE=to_image,
        BLOCK=ELEMENTS,
        num_warps=4,
    )
