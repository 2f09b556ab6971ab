// Opcodes of matrix instructions.
#pragma once
#include "decoder.h"
#include "mma.h"

static void decode_ldmatrix(Decoder& d) {
  d.need(2);
  Ins& ins = d.ins;
  bool store = d.is("stmatrix");
  if (!d.has("m8n8") || d.type != T_B16) d.unsupported();
  size_t matrices = d.has("x4") ? 4 : d.has("x2") ? 2 : 1;
  std::vector<u32> registers = d.registers(d.operands[store ? 1 : 0], 4, !store);
  if (registers.size() != matrices) d.unsupported();
  ins.list = d.builder.list(registers);
  ins.count = (u8)matrices;
  d.address(d.operands[store ? 0 : 1]);
  ins.mode = d.has("trans");
  ins.mode2 = store;
  ins.space = SP_SHARED;
  d.emit_sync(h_ldmatrix, store ? C_STSHARED : C_LDMATRIX);
}

struct MmaShape {
  int m, n, k;
};
static MmaShape mma_shape(const Decoder& d) {
  MmaShape s;
  for (auto& x : d.parts)
    if (x.size() > 2 && x[0] == 'm' && is_digit(x[1]))
      if (sscanf(x.c_str(), "m%dn%dk%d", &s.m, &s.n, &s.k) == 3) return s;
  d.unsupported();
}

// Sets mode, mode2 and sign; returns the bytes of an element of A.
static int mma_element_type(Decoder& d, Type a, Type b) {
  Ins& ins = d.ins;
  switch (a) {
    case T_F16: ins.mode = MM_F16; return 2;
    case T_BF16: ins.mode = MM_BF16; return 2;
    case T_TF32: ins.mode = MM_TF32; return 4;
    case T_S8: case T_U8:
      ins.mode = MM_INT8;
      ins.sign = (a == T_S8 ? MMA_A_SIGNED : 0) | (b == T_S8 ? MMA_B_SIGNED : 0);
      if (d.has("satfinite")) ins.flag |= MMA_SATURATE;
      return 1;
    case T_E4M3: case T_E5M2:
      ins.mode = a == T_E4M3 ? MM_E4M3 : MM_E5M2;
      ins.mode2 = b == T_E4M3 ? MM_E4M3 : MM_E5M2;
      return 1;
    default: d.unsupported();
  }
}

static void decode_mma(Decoder& d) {
  d.need(4);
  Ins& ins = d.ins;
  MmaShape shape = mma_shape(d);
  size_t n = d.types.size();
  if (d.has("sp") || d.has("block_scale") || n < 4) d.unsupported();
  Type result = d.types[n - 4], a = d.types[n - 3], b = d.types[n - 2];
  int reg_width = result == T_F64 ? 8 : 4;
  std::vector<u32> all;
  size_t counts[4];
  for (int k = 0; k < 4; k++) {
    auto registers = d.registers(d.operands[k], reg_width, k == 0, result == T_F64 ? T_F64 : T_F32);
    counts[k] = registers.size();
    all.insert(all.end(), registers.begin(), registers.end());
  }
  ins.list = d.builder.list(all);
  ins.count = (u8)counts[0];
  ins.reg_size = (u8)counts[1];
  ins.addr_size = (u8)counts[2];
  ins.flops = 2u * shape.m * shape.n * shape.k;
  ins.flag = result == T_F16 ? MMA_F16_ACC : 0;
  if (a == T_F64) {
    ins.mode = MM_F64;
    bool small = shape.m == 8 && shape.k == 4, large = shape.m == 16 && (shape.k == 4 || shape.k == 8 || shape.k == 16);
    if (shape.n != 8 || !(small || large)) d.unsupported();
    size_t halves = shape.m / 8, k_steps = shape.k / 4;
    if (counts[0] != 2 * halves || counts[1] != halves * k_steps || counts[2] != k_steps) d.unsupported();
  } else {
    if (shape.m != 16 || shape.n != 8 || counts[1] != 2 * counts[2] || counts[2] > 2) d.unsupported();
    if ((a == T_F16 || a == T_BF16) && b != a) d.unsupported();
    int elem_size = mma_element_type(d, a, b);
    if (shape.k * elem_size != (int)counts[2] * 16) d.unsupported();
    if (counts[0] != (ins.flag & MMA_F16_ACC ? 2u : 4u)) d.unsupported();
  }
  d.emit_sync(h_mma, C_MMA);
}

static void decode_wgmma(Decoder& d) {
  Ins& ins = d.ins;
  auto& o = d.operands;
  if (d.has("fence")) return d.emit_sync(h_nop, C_BAR);
  if (d.has("commit_group")) return d.emit_sync(h_wgmma_commit, C_MMA);
  if (d.has("wait_group")) {
    ins.imm = (s64)d.immediate(0);
    return d.emit_sync(h_wgmma_wait, C_BAR);
  }
  d.need(4);
  MmaShape shape = mma_shape(d);
  size_t n = d.types.size();
  if (shape.m != 64 || d.has("sp") || n < 3) d.unsupported();
  Type result = d.types[n - 3], a = d.types[n - 2], b = d.types[n - 1];
  ins.flag = result == T_F16 ? MMA_F16_ACC : 0;
  std::vector<u32> accumulators = d.registers(o[0], 4, true);
  if ((int)accumulators.size() != shape.n / (ins.flag ? 4 : 2)) d.unsupported();
  ins.list = d.builder.list(accumulators);
  ins.count = (u8)accumulators.size();
  if (o[1].kind == Operand::VEC) {
    std::vector<u32> registers = d.registers(o[1], 4, false);
    if (registers.size() != 4) d.unsupported();
    ins.list2 = d.builder.list(registers);
    ins.reg_size = 4;
  } else {
    ins.slot[1] = d.builder.source(o[1], 8, T_B64);
  }
  ins.slot[2] = d.builder.source(o[2], 8, T_B64);
  bool negated;
  ins.pred1 = d.builder.predicate_source(o[3], negated);
  ins.elem_size = negated ? WG_NEGATE_SCALE : 0;
  ins.imm = shape.n;
  int elem_size = mma_element_type(d, a, b);
  if (ins.mode != MM_INT8) {  // factors of A and B
    d.need(6);
    if ((s64)d.immediate(4, T_S32) != 1 || (s64)d.immediate(5, T_S32) != 1)
      throw SimError("wgmma with a negated operand");
  }
  if (shape.k * elem_size != 32) d.unsupported();
  if (elem_size == 2) {  // only 16-bit operands can be transposed, and A only in shared memory
    size_t k = 6;
    if (ins.reg_size != 4 && k < o.size() && d.immediate((int)k++)) ins.elem_size |= WG_TRANSPOSE_A;
    if (k < o.size() && d.immediate((int)k)) ins.elem_size |= WG_TRANSPOSE_B;
  }
  ins.flops = 2u * 16 * shape.n * shape.k;  // per warp
  d.emit_sync(h_wgmma, C_MMA);
}
