// Matrix instructions on registers and shared memory: ldmatrix, stmatrix, mma, wgmma.
#pragma once
#include "memory.h"

// ---------------------------------------------------------------- ldmatrix, stmatrix
// d (8 x 8, 16 bits) = transpose of the 8 rows
INLINE void transpose8(u8* const* row, u16* d) {
#if defined(__SSE2__)
  __m128i r[8], a[8], b[8];
  for (int k = 0; k < 8; k++) r[k] = _mm_loadu_si128((const __m128i*)row[k]);
  for (int k = 0; k < 4; k++) {
    a[2 * k] = _mm_unpacklo_epi16(r[2 * k], r[2 * k + 1]);
    a[2 * k + 1] = _mm_unpackhi_epi16(r[2 * k], r[2 * k + 1]);
  }
  for (int k = 0; k < 2; k++)
    for (int h = 0; h < 2; h++) {
      b[4 * k + 2 * h] = _mm_unpacklo_epi32(a[4 * k + h], a[4 * k + 2 + h]);
      b[4 * k + 2 * h + 1] = _mm_unpackhi_epi32(a[4 * k + h], a[4 * k + 2 + h]);
    }
  for (int k = 0; k < 4; k++) {
    _mm_storeu_si128((__m128i*)(d + 16 * k), _mm_unpacklo_epi64(b[k], b[4 + k]));
    _mm_storeu_si128((__m128i*)(d + 16 * k + 8), _mm_unpackhi_epi64(b[k], b[4 + k]));
  }
#else
  u16 t[8][8];
  for (int r = 0; r < 8; r++) memcpy(t[r], row[r], 16);
  for (int r = 0; r < 8; r++)
    for (int q = 0; q < 8; q++) d[r * 8 + q] = t[q][r];
#endif
}

// The addresses come from the first 8 * count lanes, one per row. mode: transposed, mode2: store. Lane 4 r + q holds the
// elements 2 q and 2 q + 1 of row r, which is the matrix in memory order.
static void h_ldmatrix(Ctx& ctx, const Ins& ins) {
  u64 address[32], size = ctx.cta->shared.size();
  addresses(ctx, ins, address);
  u8* base = ctx.cta->shared.data();
  bool checked = ctx.shadowed(), store = ins.mode2, transposed = ins.mode;
  for (int k = 0; k < ins.count; k++) {
    u8* row[8];
    for (int r = 0; r < 8; r++) {
      int lane = k * 8 + r;
      u64 a = shared_offset(address[lane]);
      if (a & 15) fail(ctx, ins, lane, fmt("misaligned ldmatrix row address %llu", (ull)a));
      if (a + 16 > size)
        fail(ctx, ins, lane,
             fmt("out-of-bounds ldmatrix/stmatrix row at shared offset %llu (size %llu)", (ull)a, (ull)size));
      address[lane] = a;
      row[r] = base + a;
      if (checked && !store) check_shared_read(ctx, ins, lane, (u32)a, 16);
    }
    u32* d = lanes<u32>(ctx, ctx.prog->lists[ins.list + k]);
    if (!store) {
      if (transposed) transpose8(row, (u16*)d);
      else
        for (int r = 0; r < 8; r++) memcpy(d + 4 * r, row[r], 16);
      continue;
    }
    u16 value[8][8];
    if (!transposed) {
      memcpy(value, d, sizeof value);
    } else {
      EACH_LANE(i) {
        value[2 * (i & 3)][i >> 2] = (u16)d[i];
        value[2 * (i & 3) + 1][i >> 2] = (u16)(d[i] >> 16);
      }
    }
    for (int r = 0; r < 8; r++) {
      if (checked) check_shared_write(ctx, ins, k * 8 + r, (u32)address[k * 8 + r], 16, (u8*)value[r]);
      memcpy(row[r], value[r], 16);
    }
  }
  if (!ctx.launch->config.stats) return;
  ctx.stat->bytes += 128u * ins.count;
  count_banks(ctx, address, 16, ins.count == 4 ? FULL : (1u << (8 * ins.count)) - 1);
}

// ---------------------------------------------------------------- one m16n8 tile
// Fragments, as in PTX: lane 4 g + t holds rows g (A[even], C[0..1]) and g + 8 (A[odd], C[2..3]) of A and C, column g of B,
// columns 2 t and 2 t + 1 of C. A register holds 4 bytes of the k extent, at byte 4 t; A[2 h] and B[h] are its h-th 16 bytes.
enum MmaType { MM_F16, MM_BF16, MM_TF32, MM_INT8, MM_F64, MM_E4M3, MM_E5M2 };
enum { MMA_F16_ACC = 1, MMA_SATURATE = 2 };      // Ins::flag
enum { MMA_A_SIGNED = 1, MMA_B_SIGNED = 2 };     // Ins::sign

#if defined(__AVX512F__)
template <int T> INLINE __m512 broadcast_of_four(__m512 x) {
  return _mm512_castsi512_ps(_mm512_shuffle_epi32(_mm512_castps_si512(x), (_MM_PERM_ENUM)(T * 0x55)));
}
// Element e of lanes 16 half .. 16 half + 15
template <int TYPE> INLINE __m512 fragment_as_f32(const u32* r, int half, int e) {
  __m512i x = _mm512_loadu_si512((const void*)(r + 16 * half));
  if (TYPE == MM_TF32) return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffffe000)));
  if (TYPE == MM_BF16)
    return _mm512_castsi512_ps(e ? _mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000)) : _mm512_slli_epi32(x, 16));
  __m512i h = e ? _mm512_srli_epi32(x, 16) : _mm512_and_si512(x, _mm512_set1_epi32(0xffff));
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(h));
}
// One k step for all 32 lanes: lanes of a group of four need the same element of A, which lane T of the group holds; lane
// 4 g + t needs column 2 t of B (and 2 t + 1), which lanes 8 t + T (and 8 t + 4 + T) hold.
template <int T> INLINE void mma_step(const __m512* a, const __m512* b, __m512 (*c)[2]) {
  const __m512i columns = _mm512_set_epi32(24, 16, 8, 0, 24, 16, 8, 0, 24, 16, 8, 0, 24, 16, 8, 0);
  __m512i even = _mm512_add_epi32(columns, _mm512_set1_epi32(T));
  __m512 b_even = _mm512_permutex2var_ps(b[0], even, b[1]);
  __m512 b_odd = _mm512_permutex2var_ps(b[0], _mm512_add_epi32(even, _mm512_set1_epi32(4)), b[1]);
  for (int half = 0; half < 2; half++) {
    __m512 top = broadcast_of_four<T>(a[half]), bottom = broadcast_of_four<T>(a[2 + half]);
    c[0][half] = _mm512_fmadd_ps(top, b_even, c[0][half]);
    c[1][half] = _mm512_fmadd_ps(top, b_odd, c[1][half]);
    c[2][half] = _mm512_fmadd_ps(bottom, b_even, c[2][half]);
    c[3][half] = _mm512_fmadd_ps(bottom, b_odd, c[3][half]);
  }
}
template <int TYPE> static void mma_tile_float(const u32* const* A, const u32* const* B, int k_blocks, float* const* C) {
  __m512 c[4][2];
  for (int r = 0; r < 4; r++)
    for (int h = 0; h < 2; h++) c[r][h] = _mm512_loadu_ps(C[r] + 16 * h);
  for (int kb = 0; kb < k_blocks; kb++)
    for (int e = 0; e < (TYPE == MM_TF32 ? 1 : 2); e++) {
      __m512 a[4], b[2];
      for (int h = 0; h < 2; h++) {
        a[h] = fragment_as_f32<TYPE>(A[kb * 2], h, e);
        a[2 + h] = fragment_as_f32<TYPE>(A[kb * 2 + 1], h, e);
        b[h] = fragment_as_f32<TYPE>(B[kb], h, e);
      }
      mma_step<0>(a, b, c);
      mma_step<1>(a, b, c);
      mma_step<2>(a, b, c);
      mma_step<3>(a, b, c);
    }
  for (int r = 0; r < 4; r++)
    for (int h = 0; h < 2; h++) _mm512_storeu_ps(C[r] + 16 * h, c[r][h]);
}
#else
template <int TYPE> static void mma_tile_float(const u32* const* A, const u32* const* B, int k_blocks, float* const* C) {
  auto element = [](u32 x, int e) {
    if (TYPE == MM_TF32) return as_float(x & 0xffffe000u);
    u16 h = (u16)(x >> (16 * e));
    return TYPE == MM_BF16 ? bf16_to_f32(h) : f16_to_f32(h);
  };
  for (int kb = 0; kb < k_blocks; kb++)
    for (int e = 0; e < (TYPE == MM_TF32 ? 1 : 2); e++)
      for (int t = 0; t < 4; t++) {
        float top[32], bottom[32], even[32], odd[32];
        EACH_LANE(i) {
          top[i] = element(A[kb * 2][(i & ~3) + t], e);
          bottom[i] = element(A[kb * 2 + 1][(i & ~3) + t], e);
          even[i] = element(B[kb][8 * (i & 3) + t], e);
          odd[i] = element(B[kb][8 * (i & 3) + 4 + t], e);
        }
        EACH_LANE(i) C[0][i] = __builtin_fmaf(top[i], even[i], C[0][i]);
        EACH_LANE(i) C[1][i] = __builtin_fmaf(top[i], odd[i], C[1][i]);
        EACH_LANE(i) C[2][i] = __builtin_fmaf(bottom[i], even[i], C[2][i]);
        EACH_LANE(i) C[3][i] = __builtin_fmaf(bottom[i], odd[i], C[3][i]);
      }
}
#endif

INLINE void unpack_accumulators(const u32* const* C, bool f16, float (*acc)[32]) {
  if (!f16) {
    for (int r = 0; r < 4; r++) memcpy(acc[r], C[r], 128);
    return;
  }
  for (int r = 0; r < 2; r++)
    EACH_LANE(i) {
      acc[2 * r][i] = f16_to_f32((u16)C[r][i]);
      acc[2 * r + 1][i] = f16_to_f32((u16)(C[r][i] >> 16));
    }
}
INLINE void pack_accumulators(const float (*acc)[32], bool f16, u32* const* D) {
  if (!f16) {
    for (int r = 0; r < 4; r++) memcpy(D[r], acc[r], 128);
    return;
  }
  for (int r = 0; r < 2; r++)
    EACH_LANE(i) D[r][i] = f32_to_f16_rn(acc[2 * r][i]) | ((u32)f32_to_f16_rn(acc[2 * r + 1][i]) << 16);
}

// Fragments of 8-bit elements to matrices: a[row][k], b[column][k].
template <class T, class FA, class FB>
INLINE void unpack_bytes(const u32* const* A, const u32* const* B, int k_blocks, T (*a)[32], T (*b)[32], FA from_a, FB from_b) {
  for (int kb = 0; kb < k_blocks; kb++)
    EACH_LANE(i)
      for (int e = 0; e < 4; e++) {
        int k = kb * 16 + (i & 3) * 4 + e, g = i >> 2;
        a[g][k] = from_a((u8)(A[kb * 2][i] >> 8 * e));
        a[8 + g][k] = from_a((u8)(A[kb * 2 + 1][i] >> 8 * e));
        b[g][k] = from_b((u8)(B[kb][i] >> 8 * e));
      }
}
static void mma_tile_int8(int flag, int sign, int k_blocks, const u32* const* A, const u32* const* B, const u32* const* C,
                          u32* const* D) {
  s32 a[16][32], b[8][32];
  auto element = [](u8 x, bool is_signed) { return is_signed ? (s32)(s8)x : (s32)x; };
  unpack_bytes(A, B, k_blocks, a, b, [&](u8 x) { return element(x, sign & MMA_A_SIGNED); },
               [&](u8 x) { return element(x, sign & MMA_B_SIGNED); });
  u32 d[4][32];  // D may be A or B too
  for (int r = 0; r < 4; r++)
    EACH_LANE(i) {
      const s32 *row = a[(i >> 2) + 8 * (r >> 1)], *column = b[2 * (i & 3) + (r & 1)];
      s64 s = 0;
      for (int k = 0; k < 16 * k_blocks; k++) s += row[k] * column[k];
      s += (s32)C[r][i];
      if (flag & MMA_SATURATE) s = s > 2147483647ll ? 2147483647ll : s < -2147483648ll ? -2147483648ll : s;
      d[r][i] = (u32)(s32)s;
    }
  for (int r = 0; r < 4; r++) memcpy(D[r], d[r], 128);
}
struct Fp8Tables {
  float e4m3[256], e5m2[256];
  Fp8Tables() {
    for (int k = 0; k < 256; k++) {
      e4m3[k] = e4m3_to_f32((u8)k);
      e5m2[k] = e5m2_to_f32((u8)k);
    }
  }
};
static void mma_tile_fp8(int type_a, int type_b, int flag, int k_blocks, const u32* const* A, const u32* const* B,
                         const u32* const* C, u32* const* D) {
  static const Fp8Tables tables;
  const float* table_a = type_a == MM_E4M3 ? tables.e4m3 : tables.e5m2;
  const float* table_b = type_b == MM_E4M3 ? tables.e4m3 : tables.e5m2;
  float a[16][32], b[8][32], acc[4][32];
  unpack_bytes(A, B, k_blocks, a, b, [&](u8 x) { return table_a[x]; }, [&](u8 x) { return table_b[x]; });
  unpack_accumulators(C, flag & MMA_F16_ACC, acc);
  for (int r = 0; r < 4; r++)
    EACH_LANE(i) {
      const float *row = a[(i >> 2) + 8 * (r >> 1)], *column = b[2 * (i & 3) + (r & 1)];
      for (int k = 0; k < 16 * k_blocks; k++) acc[r][i] = __builtin_fmaf(row[k], column[k], acc[r][i]);
    }
  pack_accumulators(acc, flag & MMA_F16_ACC, D);
}

// k_blocks: 16-byte blocks of the k extent
static void mma_tile(const Ins& ins, int k_blocks, const u32* const* A, const u32* const* B, const u32* const* C,
                     u32* const* D) {
  if (ins.mode == MM_INT8) return mma_tile_int8(ins.flag, ins.sign, k_blocks, A, B, C, D);
  if (ins.mode > MM_TF32) return mma_tile_fp8(ins.mode, ins.mode2, ins.flag, k_blocks, A, B, C, D);
  alignas(64) float acc[4][32];
  float* c[4] = {acc[0], acc[1], acc[2], acc[3]};
  unpack_accumulators(C, ins.flag & MMA_F16_ACC, acc);
  if (ins.mode == MM_BF16) mma_tile_float<MM_BF16>(A, B, k_blocks, c);
  else if (ins.mode == MM_F16) mma_tile_float<MM_F16>(A, B, k_blocks, c);
  else mma_tile_float<MM_TF32>(A, B, k_blocks, c);
  pack_accumulators(acc, ins.flag & MMA_F16_ACC, D);
}

// ---------------------------------------------------------------- mma
// m8n8k4, and on sm_90 m16n8k4, k8 and k16. Lane 4 g + t holds rows g and, of 16, g + 8 of A, at columns t, t + 4, ...; B
// likewise by columns; C as in the other types.
static void mma_f64(Ctx& ctx, const Ins& ins, const u32* D, const u32* A, const u32* B, const u32* C) {
  double a[16][16], b[16][8], d[4][32];
  int halves = ins.count / 2, k_extent = 4 * ins.addr_size;
  EACH_LANE(i) {
    int g = i >> 2, t = i & 3;
    for (int r = 0; r < ins.reg_size; r++) a[g + 8 * (r % halves)][t + 4 * (r / halves)] = lanes<double>(ctx, A[r])[i];
    for (int r = 0; r < ins.addr_size; r++) b[t + 4 * r][g] = lanes<double>(ctx, B[r])[i];
  }
  for (int r = 0; r < ins.count; r++)
    EACH_LANE(i) {
      d[r][i] = lanes<double>(ctx, C[r])[i];
      const double* row = a[(i >> 2) + 8 * (r >> 1)];
      for (int k = 0; k < k_extent; k++) d[r][i] = std::fma(row[k], b[k][2 * (i & 3) + (r & 1)], d[r][i]);
    }
  for (int r = 0; r < ins.count; r++) memcpy(lanes<double>(ctx, D[r]), d[r], sizeof d[r]);
}

// mode: MmaType, mode2: that of B for fp8; list: registers of D, A, B and C, of which there are count, reg_size, addr_size
// and count.
static void h_mma(Ctx& ctx, const Ins& ins) {
  const u32* D_slots = &ctx.prog->lists[ins.list];
  const u32 *A_slots = D_slots + ins.count, *B_slots = A_slots + ins.reg_size, *C_slots = B_slots + ins.addr_size;
  if (ins.mode == MM_F64) return mma_f64(ctx, ins, D_slots, A_slots, B_slots, C_slots);
  const u32 *A[4], *B[2], *C[4];
  u32* D[4];
  for (int k = 0; k < ins.reg_size; k++) A[k] = lanes<u32>(ctx, A_slots[k]);
  for (int k = 0; k < ins.addr_size; k++) B[k] = lanes<u32>(ctx, B_slots[k]);
  for (int k = 0; k < ins.count; k++) {
    C[k] = lanes<u32>(ctx, C_slots[k]);
    D[k] = lanes<u32>(ctx, D_slots[k]);
  }
  mma_tile(ins, ins.addr_size, A, B, C, D);
}

// ---------------------------------------------------------------- wgmma (sm_90)
// A shared-memory descriptor: start, leading and stride byte offsets, swizzle (1: 128, 2: 64, 3: 32 bytes).
struct SmemDesc {
  u32 start, leading, stride, swizzle;
};
INLINE SmemDesc smem_desc(u64 d) {
  return {(u32)(d & 0x3fff) << 4, (u32)((d >> 16) & 0x3fff) << 4, (u32)((d >> 32) & 0x3fff) << 4, (u32)(d >> 62)};
}
// The 16-byte blocks of a row are exchanged by bits of the row's number, which are bits 7.. of the address.
INLINE u32 swizzled(u32 a, u32 mode) {
  switch (mode) {
    case 1: return a ^ (((a >> 7) & 7) << 4);
    case 2: return a ^ (((a >> 7) & 3) << 4);
    case 3: return a ^ (((a >> 7) & 1) << 4);
    default: return a;
  }
}
// Address of byte kb of the k extent in row or column mn, of an operand with k contiguous.
INLINE u32 k_major(const SmemDesc& d, u32 mn, u32 kb) {
  u32 width = d.swizzle == 1 ? 128 : d.swizzle == 2 ? 64 : 32;
  u32 a = d.swizzle ? d.start + (mn & 7) * width + (mn >> 3) * d.stride + kb
                    : d.start + (mn & 7) * 16 + (mn >> 3) * d.stride + (kb >> 4) * d.leading + (kb & 15);
  return swizzled(a, d.swizzle);
}
// Address of 16-bit element (mn, k) of an operand with mn contiguous.
INLINE u32 mn_major(const SmemDesc& d, u32 mn, u32 k) {
  u32 width = d.swizzle == 1 ? 64 : d.swizzle == 2 ? 32 : 16;
  u32 a = d.swizzle ? d.start + (mn % width) * 2 + (mn / width) * d.leading + (k & 7) * (2 * width) + (k >> 3) * d.stride
                    : d.start + (mn & 7) * 2 + (mn >> 3) * d.stride + (k & 7) * 16 + (k >> 3) * d.leading;
  return swizzled(a, d.swizzle);
}

enum { WG_NEGATE_SCALE = 1, WG_TRANSPOSE_A = 2, WG_TRANSPOSE_B = 4 };  // Ins::elem_size

// mode, mode2, flag, sign as for mma; imm: N; list: registers of D; reg_size 4: A in the registers of list2, else slot[1] has
// its descriptor; slot[2]: descriptor of B; pred1: whether D is added to. Each warp computes its 16 of the 64 rows when it
// gets here: nothing else reads them.
static void h_wgmma(Ctx& ctx, const Ins& ins) {
  u32 N = (u32)ins.imm, size = (u32)ctx.cta->shared.size(), warp_of_group = (u32)ctx.warp->id & 3;
  bool checked = ctx.shadowed();
  std::vector<u32> touched;
  auto read = [&](u32 a, int n, int lane) {
    if (a + (u32)n > size)
      fail(ctx, ins, lane, fmt("wgmma reads shared memory at offset %u, beyond the CTA's %u bytes", a, size));
    if (checked) {
      check_shared_read(ctx, ins, lane, a, n);
      touched.push_back(a >> 4);
    }
    u32 x = 0;
    memcpy(&x, ctx.cta->shared.data() + a, n);
    return x;
  };
  auto fragment = [&](const SmemDesc& d, bool transposed, u32 row, int kb, int lane) {
    int t = lane & 3;
    if (!transposed) return read(k_major(d, row, (u32)(kb * 16 + t * 4)), 4, lane);
    u32 k = (u32)(kb * 8 + t * 2);
    return read(mn_major(d, row, k), 2, lane) | (read(mn_major(d, row, k + 1), 2, lane) << 16);
  };
  alignas(64) u32 a[4][32], b[2][32];
  alignas(64) static const u32 zero[32] = {};
  const u32 *A[4], *B[2] = {b[0], b[1]}, *C[4];
  u32* D[4];
  if (ins.reg_size == 4) {
    for (int k = 0; k < 4; k++) A[k] = lanes<u32>(ctx, ctx.prog->lists[ins.list2 + k]);
  } else {
    SmemDesc desc = smem_desc(lanes<u64>(ctx, ins.slot[1])[0]);
    for (int k = 0; k < 4; k++) {
      A[k] = a[k];
      EACH_LANE(i)
        a[k][i] = fragment(desc, ins.elem_size & WG_TRANSPOSE_A, 16 * warp_of_group + (u32)(i >> 2) + 8 * (k & 1), k >> 1, i);
    }
  }
  SmemDesc desc = smem_desc(lanes<u64>(ctx, ins.slot[2])[0]);
  bool accumulates = (ctx.preds[ins.pred1] ^ (ins.elem_size & WG_NEGATE_SCALE)) & 1;
  int registers = ins.flag & MMA_F16_ACC ? 2 : 4;
  for (u32 tile = 0; tile < N / 8; tile++) {
    for (int kb = 0; kb < 2; kb++)
      EACH_LANE(i) b[kb][i] = fragment(desc, ins.elem_size & WG_TRANSPOSE_B, 8 * tile + (u32)(i >> 2), kb, i);
    for (int r = 0; r < registers; r++) {
      D[r] = lanes<u32>(ctx, ctx.prog->lists[ins.list + tile * registers + r]);
      C[r] = accumulates ? D[r] : zero;
    }
    mma_tile(ins, 2, A, B, C, D);
  }
  if (checked) {
    std::sort(touched.begin(), touched.end());
    touched.erase(std::unique(touched.begin(), touched.end()), touched.end());
    auto& open = ctx.warp->wgmma_open;
    open.insert(open.end(), touched.begin(), touched.end());
  }
  if (ctx.launch->config.stats) ctx.stat->bytes += (u64)(ins.reg_size == 4 ? 0 : 16 * 32) + (u64)N * 32 / 4;
}
static void h_wgmma_commit(Ctx& ctx, const Ins&) {
  ctx.warp->wgmma_groups.push_back(std::move(ctx.warp->wgmma_open));
  ctx.warp->wgmma_open.clear();
}
// imm: groups that may stay in flight. The hardware may read the operands of a group until it is waited for, so the wait
// reads them again for the race check.
static void h_wgmma_wait(Ctx& ctx, const Ins& ins) {
  auto& groups = ctx.warp->wgmma_groups;
  while (groups.size() > (size_t)ins.imm) {
    if (ctx.launch->config.check_race)
      for (u32 block : groups.front()) {
        u32 a = block << 4;
        check_shared_read(ctx, ins, 0, a, (int)std::min<u64>(16, ctx.cta->shared.size() - a), true);
      }
    groups.erase(groups.begin());
  }
}
