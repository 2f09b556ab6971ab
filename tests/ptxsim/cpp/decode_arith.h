// Opcodes of predicates, moves, conversions and arithmetic.
#pragma once
#include "convert.h"
#include "decoder.h"
#include "predicates.h"

// ---------------------------------------------------------------- predicates
static int comparison(const Decoder& d) {
  auto it = COMPARISONS.find(d.parts[1]);
  if (it == COMPARISONS.end()) d.unsupported();
  return it->second;
}
static InsClass comparison_class(const Decoder& d) { return is_float(d.type) ? d.float_class() : C_INT; }

static void decode_setp(Decoder& d) {
  d.need(3);
  Ins& ins = d.ins;
  const Operand& result = d.operands[0];
  int c = comparison(d);
  if (c == CNE && !is_float(d.type)) c = CNEU;  // integers are never unordered, and this test is cheaper
  ins.pred0 = d.builder.predicate(result.text);
  if (!result.second.empty() && result.second != "_") ins.pred1 = d.builder.predicate(result.second);
  d.source(0, 1, d.width, d.type);
  d.source(1, 2, d.width, d.type);
  if (d.operands.size() > 3) {
    bool negated;
    ins.pred2 = d.builder.predicate_source(d.operands[3], negated);
    ins.flag = negated;
    ins.mode2 = d.has("and") ? 1 : d.has("or") ? 2 : 3;
  }
  d.emit(setp_handler(c, d.type), comparison_class(d));
}

static void decode_set(Decoder& d) {
  static const std::set<Type> OPERANDS = {T_F32, T_F64, T_F16, T_BF16, T_F16X2, T_BF16X2, T_S32, T_U32, T_B32};
  d.need(3);
  if (d.types.size() < 2 || d.operands.size() > 3 || !OPERANDS.count(d.type)) d.unsupported();
  d.ins.mode = (u8)comparison(d);
  d.destination(0, std::max(2, type_size(d.first_type)));
  d.source(1, 1, d.width, d.type);
  d.source(2, 2, d.width, d.type);
  d.ins.slot[4] = d.first_type;
  d.ins.slot[5] = d.type;
  d.emit(h_set, comparison_class(d));
}

static void decode_testp(Decoder& d) {
  d.need(2);
  d.ins.pred0 = d.builder.predicate(d.operands[0].text);
  d.source(0, 1, d.width, d.type);
  d.ins.reg_size = (u8)d.width;
  d.ins.mode = (u8)std::max(0, d.which(TESTP_NAMES));
  d.emit(h_testp, d.float_class());
}

static void decode_selp(Decoder& d) {
  d.need(4);
  d.plain_operands(2);
  bool negated;
  d.ins.pred0 = d.builder.predicate_source(d.operands[3], negated);
  d.ins.flag = negated;
  Handler handler = d.width == 2 ? h_selp<u16> : d.width == 4 ? h_selp<u32> : d.width == 8 ? h_selp<u64> : nullptr;
  d.emit(handler, comparison_class(d));
}

static void decode_predicate_logic(Decoder& d) {
  static const std::map<std::string, int> OPS = {{"and", 0}, {"or", 1}, {"xor", 2}, {"not", 3}, {"mov", 4}};
  auto it = OPS.find(d.opcode());
  if (it == OPS.end()) d.unsupported();
  Ins& ins = d.ins;
  ins.mode = (u8)it->second;
  ins.pred0 = d.builder.predicate(d.operands[0].text);
  bool negated;
  ins.pred1 = d.builder.predicate_source(d.operands[1], negated);
  ins.flag = negated;
  if (ins.mode < 3) {
    d.need(3);
    ins.pred2 = d.builder.predicate_source(d.operands[2], negated);
    ins.flag |= negated << 1;
  }
  d.emit(h_predicate_logic, C_PRED);
}

// ---------------------------------------------------------------- mov
static void decode_pack(Decoder& d) {
  bool unpack = d.operands[0].kind == Operand::VEC;
  const Operand& vector = d.operands[unpack ? 0 : 1];
  int w = d.width, n = (int)vector.parts.size(), part = w / n, reg = std::max(2, part);
  std::vector<u32> parts;
  for (auto& q : vector.parts) {
    if (!unpack) parts.push_back(d.builder.source(q, reg));
    else parts.push_back(q.text == "_" ? NO_SLOT : d.builder.destination(q, reg));
  }
  d.ins.list = d.builder.list(parts);
  d.ins.count = (u8)n;
  d.ins.slot[0] = unpack ? d.builder.source(d.operands[1], w) : d.builder.destination(d.operands[0], w);
  Handler handler = nullptr;
  if (w == 4 && part == 2) handler = SELECT(unpack, (h_unpack<u32, u16>), (h_pack<u32, u16>));
  else if (w == 8 && part == 4) handler = SELECT(unpack, (h_unpack<u64, u32>), (h_pack<u64, u32>));
  else if (w == 8 && part == 2) handler = SELECT(unpack, (h_unpack<u64, u16>), (h_pack<u64, u16>));
  else if (w == 2 && part == 1) handler = SELECT(unpack, h_unpack8<u16>, h_pack8<u16>);
  else if (w == 4 && part == 1) handler = SELECT(unpack, h_unpack8<u32>, h_pack8<u32>);
  else if (part == 1) handler = SELECT(unpack, h_unpack8<u64>, h_pack8<u64>);
  d.emit(handler, C_MOV);
}

static void decode_mov(Decoder& d) {
  if (d.type == T_PRED) return decode_predicate_logic(d);
  d.need(2);
  if (d.operands[0].kind == Operand::VEC || d.operands[1].kind == Operand::VEC) return decode_pack(d);
  static const std::set<std::string> CLOCKS = {"%clock", "%clock64", "%globaltimer", "%clock_hi", "%globaltimer_lo"};
  d.destination(0, d.width);
  if (CLOCKS.count(d.operands[1].text)) {
    d.ins.reg_size = (u8)d.width;
    return d.emit(h_clock, C_OTHER);
  }
  d.source(1, 1, d.width, d.type);
  d.emit(map1_of_width<Mov>(d.width), C_MOV);
}

// ---------------------------------------------------------------- cvt
template <class D> static Handler cvt_int_from(int width, bool is_signed) {
  switch (width) {
    case 1: case 2: return SELECT(is_signed, (h_cvt_int<D, s16>), (h_cvt_int<D, u16>));
    case 4: return SELECT(is_signed, (h_cvt_int<D, s32>), (h_cvt_int<D, u32>));
    default: return SELECT(is_signed, (h_cvt_int<D, s64>), (h_cvt_int<D, u64>));
  }
}

// Pairs of results, or of fp8 values.
static void decode_cvt_pair(Decoder& d, Type to, Type from) {
  bool bf16 = to == T_BF16X2, e5m2 = to == T_E5M2X2 || from == T_E5M2X2;
  bool from_f32 = from == T_F32, to_fp8 = to == T_E4M3X2 || to == T_E5M2X2, from_fp8 = from == T_E4M3X2 || from == T_E5M2X2;
  d.destination(0, to_fp8 ? 2 : 4);
  if (from_f32) {
    d.need(3);
    d.source(1, 1, 4, T_F32);
    d.source(2, 2, 4, T_F32);
    if (to_fp8) return d.emit(e5m2 ? h_cvt_f32_fp8x2<1> : h_cvt_f32_fp8x2<0>, C_CVT);
    if (d.has("satfinite")) d.unsupported();
    d.ins.flag = d.has("relu");
    return d.emit(bf16 ? h_cvt_pack_half<1> : h_cvt_pack_half<0>, C_CVT);
  }
  if (to_fp8 && from == T_F16X2) {
    d.source(1, 1, 4, T_B32);
    return d.emit(e5m2 ? h_cvt_f16x2_fp8x2<1> : h_cvt_f16x2_fp8x2<0>, C_CVT);
  }
  if (to == T_F16X2 && from_fp8) {
    d.source(1, 1, 2, T_B16);
    return d.emit(e5m2 ? h_cvt_fp8x2_f16x2<1> : h_cvt_fp8x2_f16x2<0>, C_CVT);
  }
  d.unsupported();
}

static void decode_cvt(Decoder& d) {
  d.need(2);
  if (d.has("pack") || d.types.size() < 2) d.unsupported();
  Ins& ins = d.ins;
  Type to = d.first_type, from = d.type;
  bool ftz = d.has("ftz"), sat = d.has("sat"), relu = d.has("relu");
  ins.mode = (u8)(d.rounding != RNONE ? d.rounding : is_float(to) ? RN : RZI);
  if (to == T_BF16X2 || to == T_F16X2 || to == T_E4M3X2 || to == T_E5M2X2) return decode_cvt_pair(d, to, from);
  auto register_width = [&](const Operand& x, int otherwise) {
    RegRef r;
    bool is_register = x.kind == Operand::REG && !Builder::is_special(x.text) && x.text != "_";
    return is_register && d.builder.find_register(x.text, r) ? r.width : std::max(2, otherwise);
  };
  int to_size = type_size(to), from_size = type_size(from);
  int to_width = register_width(d.operands[0], to_size), from_width = register_width(d.operands[1], from_size);
  d.destination(0, to_width);
  d.source(1, 1, from_width, from);
  ins.reg_size = (u8)to_width;
  ins.addr_size = (u8)from_width;
  ins.flag = (ftz ? 1 : 0) | (sat ? 2 : 0) | (relu ? 4 : 0);
  bool to_float = is_float(to) || to == T_TF32, from_float = is_float(from), plain = !ins.flag;
  if (to == T_TF32) {
    if (relu) d.unsupported();
    return d.emit(h_cvt_tf32, C_CVT);
  }
  if (!to_float && !from_float && !sat && to_size == to_width && from_size == from_width) {
    bool sign = is_signed(from);
    return d.emit(to_width == 2   ? cvt_int_from<u16>(from_width, sign)
                  : to_width == 4 ? cvt_int_from<u32>(from_width, sign)
                                  : cvt_int_from<u64>(from_width, sign),
                  C_CVT);
  }
  if (to == T_F32 && !from_float && from_width == from_size && !sat && from_width >= 4 && (d.rounding == RN || d.directed()))
    return d.emit(from == T_S32   ? h_cvt_int_f32<s32>
                  : from == T_U32 ? h_cvt_int_f32<u32>
                  : from == T_S64 ? h_cvt_int_f32<s64>
                                  : h_cvt_int_f32<u64>,
                  C_CVT);
  if (to == T_F32 && from == T_BF16 && plain && d.rounding == RNONE) return d.emit(h_cvt_half_f32<1>, C_CVT);
  if (to == T_F32 && from == T_F16 && !sat && !relu && d.rounding == RNONE) return d.emit(h_cvt_half_f32<0>, C_CVT);
  if (to == T_F16 && from == T_F32 && plain && d.rounding == RN) return d.emit(h_cvt_f32_half<0>, C_CVT);
  if (to == T_BF16 && from == T_F32 && plain && d.rounding == RN) return d.emit(h_cvt_f32_half<1>, C_CVT);
  if (!to_float && from_float && to_size == to_width && to_width >= 4) {
    ins.flag = (ftz ? 1 : 0) | (from == T_BF16 ? 2 : 0);
    return d.emit(to == T_S32   ? h_cvt_float_int<s32>
                  : to == T_U32 ? h_cvt_float_int<u32>
                  : to == T_S64 ? h_cvt_float_int<s64>
                                : h_cvt_float_int<u64>,
                  C_CVT);
  }
  ins.slot[4] = to;
  ins.slot[5] = from;
  d.emit(h_cvt_general, C_CVT);
}

// ---------------------------------------------------------------- floating point
static void decode_half(Decoder& d) {
  static const std::map<std::string, int> OPS = {{"add", HO_ADD}, {"sub", HO_SUB}, {"mul", HO_MUL}, {"fma", HO_FMA},
                                                 {"min", HO_MIN}, {"max", HO_MAX}, {"neg", HO_NEG}, {"abs", HO_ABS},
                                                 {"ex2", HO_EX2}, {"tanh", HO_TANH}};
  auto it = OPS.find(d.opcode());
  if (it == OPS.end() || d.has("sat") || d.has("oob")) d.unsupported();
  int op = it->second, flops = op == HO_FMA ? 2 : 1;
  if (op == HO_FMA && d.has("relu")) op = HO_FMARELU, flops = 1;
  if (op == HO_MIN && d.has("NaN")) op = HO_MINN;
  if (op == HO_MAX && d.has("NaN")) op = HO_MAXN;
  d.up_to_three_sources();
  d.ins.flops = flops * (d.width == 4 ? 2 : 1);
  d.emit(half_handler(d.type, op), op == HO_EX2 || op == HO_TANH ? C_SFU : C_FP16);
}

static void emit_f32(Decoder& d, Handler handler, InsClass cls) {
  d.emit(handler, cls);
  if (!d.has("sat")) return;
  d.ins.slot[1] = d.ins.slot[0];
  d.ins.flops = 0;
  d.emit(map1<FSat>, cls);
}
template <template <bool> class Op> static Handler float1(bool ftz) { return SELECT(ftz, map1<Op<true>>, map1<Op<false>>); }
template <template <bool> class Op> static Handler float2(bool ftz) { return SELECT(ftz, map2<Op<true>>, map2<Op<false>>); }
template <template <bool> class Op> static Handler float3(bool ftz) { return SELECT(ftz, map3<Op<true>>, map3<Op<false>>); }

static void decode_f32(Decoder& d) {
  static const std::map<std::string, Handler> DIRECTED = {
      {"add", h_fdir<DIR_ADD>}, {"sub", h_fdir<DIR_SUB>}, {"mul", h_fdir<DIR_MUL>}, {"fma", h_fdir<DIR_FMA>},
      {"mad", h_fdir<DIR_FMA>}, {"div", h_fdir<DIR_DIV>}, {"rcp", h_fdir<DIR_RCP>}, {"sqrt", h_fdir<DIR_SQRT>}};
  typedef Handler (*OfFtz)(bool);
  static const std::map<std::string, OfFtz> ARITHMETIC = {
      {"add", float2<FAdd>}, {"sub", float2<FSub>}, {"mul", float2<FMul>}, {"fma", float3<FFma>}, {"mad", float3<FFma>},
      {"min", float2<FMin>}, {"max", float2<FMax>}, {"abs", float1<FAbs>}, {"neg", float1<FNeg>}};
  static const std::map<std::string, OfFtz> SPECIAL = {
      {"div", float2<FDiv>}, {"sqrt", float1<FSqrt>}, {"rsqrt", float1<FRsqrt>}, {"rcp", float1<FRcp>}, {"ex2", float1<FEx2>},
      {"lg2", float1<FLg2>}, {"sin", float1<FSin>},   {"cos", float1<FCos>},     {"tanh", float1<FTanh>}};
  d.need(2);
  const std::string& op = d.opcode();
  bool ftz = d.has("ftz"), nan = d.has("NaN"), is_min = op == "min", is_max = op == "max", is_fma = op == "fma" || op == "mad";
  d.up_to_three_sources();
  d.ins.flops = is_fma ? 2 : 1;
  if (d.directed() && DIRECTED.count(op)) {
    d.ins.mode = (u8)d.rounding;
    d.ins.flag = ftz;
    return emit_f32(d, DIRECTED.at(op), C_FP32);
  }
  if (d.has("xorsign")) {
    if (nan || ftz) d.unsupported();
    return emit_f32(d, SELECT(is_min, map2<FMinXorsign>, map2<FMaxXorsign>), C_FP32);
  }
  if (is_fma) d.need(4);
  if ((is_min || is_max) && d.operands.size() > 3) d.unsupported();
  if (is_min && nan) return emit_f32(d, map2<FMinNan>, C_FP32);
  if (is_max && nan) return emit_f32(d, map2<FMaxNan>, C_FP32);
  if (op == "copysign") return emit_f32(d, map2<FCopysign>, C_FP32);
  if (ARITHMETIC.count(op)) return emit_f32(d, ARITHMETIC.at(op)(ftz), C_FP32);
  if (SPECIAL.count(op)) return emit_f32(d, SPECIAL.at(op)(ftz), C_SFU);
  d.unsupported();
}

static void decode_f64(Decoder& d) {
  static const std::map<std::string, Handler> OPS = {
      {"add", map2<DAdd>},   {"sub", map2<DSub>}, {"mul", map2<DMul>}, {"div", map2<DDiv>}, {"fma", map3<DFma>},
      {"mad", map3<DFma>},   {"min", map2<DMin>}, {"max", map2<DMax>}, {"abs", map1<DAbs>}, {"neg", map1<DNeg>},
      {"sqrt", map1<DSqrt>}, {"rsqrt", map1<DRsqrt>}, {"rcp", map1<DRcp>}, {"copysign", map2<DCopysign>}};
  d.need(2);
  if (d.directed()) d.unsupported();
  d.up_to_three_sources();
  d.ins.flops = d.is("fma") ? 2 : 1;
  auto it = OPS.find(d.opcode());
  d.emit(it == OPS.end() ? nullptr : it->second, C_FP64);
}

// ---------------------------------------------------------------- integers
static void decode_int_pair(Decoder& d) {
  d.need(3);
  d.up_to_three_sources();
  bool sign = d.type == T_S16X2;
  Handler handler = nullptr;
  if (d.is("add")) handler = h_x2int<u16, Add<u16>>;
  if (d.is("min")) handler = SELECT(sign, (h_x2int<s16, Min<s16>>), (h_x2int<u16, Min<u16>>));
  if (d.is("max")) handler = SELECT(sign, (h_x2int<s16, Max<s16>>), (h_x2int<u16, Max<u16>>));
  d.emit(handler, C_INT);
}

static void decode_carry(Decoder& d) {
  bool multiplies = d.opcode()[0] == 'm', takes_carry = d.opcode().back() == 'c';
  d.need(multiplies ? 4 : 3);
  d.plain_operands(multiplies ? 3 : 2);
  d.ins.reg_size = (u8)d.width;
  d.ins.flag = (takes_carry ? CARRY_IN : 0) | (d.has("cc") ? CARRY_OUT : 0);
  if (!multiplies) {
    d.ins.mode = d.opcode()[0] == 's';
    return d.emit(h_addc, C_INT);
  }
  d.ins.mode = d.has("hi");
  d.ins.mode2 = is_signed(d.type);
  d.emit(h_madc, C_INT);
}

static void decode_int_two(Decoder& d) {
  typedef Handler (*OfType)(Type);
  static const std::map<std::string, OfType> OPS = {
      {"add", map2_of_type<Add>}, {"sub", map2_of_type<Sub>},  {"min", map2_of_type<Min>},
      {"max", map2_of_type<Max>}, {"div", map2_of_type<DivI>}, {"rem", map2_of_type<RemI>}};
  d.need(3);
  if (d.has("sat")) d.unsupported();
  d.plain_operands(2);
  d.emit(OPS.at(d.opcode())(d.type), C_INT);
}
static void decode_bitwise(Decoder& d) {
  d.need(3);
  d.plain_operands(2);
  if (d.is("and")) return d.emit(map2_of_width<And>(d.width), C_INT);
  if (d.is("or")) return d.emit(map2_of_width<Or>(d.width), C_INT);
  d.emit(map2_of_width<Xor>(d.width), C_INT);
}

static void decode_int_mul(Decoder& d) {
  d.need(3);
  if (!d.has("wide")) {
    d.plain_operands(2);
    if (d.has("hi")) return d.emit(map2_of_type<MulHi>(d.type), C_INT);
    return d.emit(d.width == 2 ? map2<MulLo16<u16>> : d.width == 4 ? map2<Mul<u32>> : map2<Mul<u64>>, C_INT);
  }
  d.destination(0, 2 * d.width);
  d.source(1, 1, d.width, d.type);
  d.source(2, 2, d.width, d.type);
  switch (d.type) {
    case T_S16: return d.emit(map2<MulWide<s32, s16>>, C_INT);
    case T_U16: return d.emit(map2<MulWide<u32, u16>>, C_INT);
    case T_S32: return d.emit(map2<MulWide<s64, s32>>, C_INT);
    case T_U32: return d.emit(map2<MulWide<u64, u32>>, C_INT);
    default: d.unsupported();
  }
}

static void decode_int_mad(Decoder& d) {
  d.need(4);
  if (!d.has("wide")) {
    d.plain_operands(3);
    if (!d.has("hi")) return d.emit(d.width == 2 ? map3<MadLo16> : d.width == 4 ? map3<MadLo<u32>> : map3<MadLo<u64>>, C_INT);
    switch (d.type) {
      case T_S32: return d.emit(map3<MadHi<s32>>, C_INT);
      case T_U32: return d.emit(map3<MadHi<u32>>, C_INT);
      case T_S64: return d.emit(map3<MadHi<s64>>, C_INT);
      case T_U64: return d.emit(map3<MadHi<u64>>, C_INT);
      default: d.unsupported();
    }
  }
  d.destination(0, 2 * d.width);
  d.source(1, 1, d.width, d.type);
  d.source(2, 2, d.width, d.type);
  d.source(3, 3, 2 * d.width, d.type);
  switch (d.type) {
    case T_S16: return d.emit(map3<MadWide<s32, s16>>, C_INT);
    case T_U16: return d.emit(map3<MadWide<u32, u16>>, C_INT);
    case T_S32: return d.emit(map3<MadWide<s64, s32>>, C_INT);
    case T_U32: return d.emit(map3<MadWide<u64, u32>>, C_INT);
    default: d.unsupported();
  }
}

static void decode_shift(Decoder& d) {
  d.need(3);
  d.plain_operands(1);
  d.source(2, 2, 4, T_U32);
  if (d.is("shl")) return d.emit(d.width == 2 ? map2<Shl<u16>> : d.width == 4 ? map2<Shl<u32>> : map2<Shl<u64>>, C_INT);
  switch (d.type) {
    case T_S16: return d.emit(map2<Shr<s16>>, C_INT);
    case T_S32: return d.emit(map2<Shr<s32>>, C_INT);
    case T_S64: return d.emit(map2<Shr<s64>>, C_INT);
    default: return d.emit(d.width == 2 ? map2<Shr<u16>> : d.width == 4 ? map2<Shr<u32>> : map2<Shr<u64>>, C_INT);
  }
}

static void decode_int_one(Decoder& d) {
  d.need(2);
  d.plain_operands(1);
  if (d.is("not")) return d.emit(map1_of_width<Not>(d.width), C_INT);
  if (d.is("cnot")) return d.emit(map1_of_width<CNot>(d.width), C_INT);
  if (d.is("brev")) return d.emit(SELECT(d.width == 4, map1<Brev32>, map1<Brev64>), C_INT);
  bool negates = d.is("neg");
  switch (d.width) {
    case 2: return d.emit(SELECT(negates, map1<NegI<s16>>, map1<AbsI<s16>>), C_INT);
    case 4: return d.emit(SELECT(negates, map1<NegI<s32>>, map1<AbsI<s32>>), C_INT);
    default: return d.emit(SELECT(negates, map1<NegI<s64>>, map1<AbsI<s64>>), C_INT);
  }
}

// The result is a 32-bit number of a bit.
static void decode_bit_count(Decoder& d) {
  d.need(2);
  if (d.has("shiftamt")) d.unsupported();
  d.destination(0, 4);
  d.source(1, 1, d.width, d.type);
  if (d.is("popc")) return d.emit(SELECT(d.width == 4, map1<Popc32>, map1<Popc64>), C_INT);
  if (d.is("clz")) return d.emit(SELECT(d.width == 4, map1<Clz32>, map1<Clz64>), C_INT);
  if (is_signed(d.type)) return d.emit(SELECT(d.width == 4, map1<BfindS32>, map1<BfindS64>), C_INT);
  d.emit(SELECT(d.width == 4, map1<BfindU32>, map1<BfindU64>), C_INT);
}

static void decode_bit_field(Decoder& d) {
  bool insert = d.is("bfi");
  int values = insert ? 2 : 1;
  d.need(3 + values);
  d.plain_operands(values);
  d.source(values + 1, values + 1, 4, T_U32);
  d.source(values + 2, values + 2, 4, T_U32);
  if (insert) return d.emit(SELECT(d.width == 4, h_bfi<u32>, h_bfi<u64>), C_INT);
  if (is_signed(d.type)) return d.emit(SELECT(d.width == 4, map3<Bfe<s32>>, map3<Bfe<s64>>), C_INT);
  d.emit(SELECT(d.width == 4, map3<Bfe<u32>>, map3<Bfe<u64>>), C_INT);
}

static void decode_prmt(Decoder& d) {
  static const char* const MODES[] = {"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
  d.need(4);
  d.plain_operands(3);
  d.ins.mode = (u8)(d.which(MODES) + 1);
  d.emit(h_prmt, C_INT);
}
static void decode_lop3(Decoder& d) {
  d.need(5);
  if (d.type != T_B32) d.unsupported();
  d.plain_operands(3);
  d.ins.imm = (s64)d.immediate(4);
  d.emit(h_lop3, C_INT);
}
static void decode_shf(Decoder& d) {
  d.need(4);
  d.plain_operands(3);
  d.ins.mode = (d.has("r") ? 1 : 0) | (d.has("clamp") ? 2 : 0);
  d.emit(h_shf, C_INT);
}
static void decode_dp4a(Decoder& d) {
  d.need(4);
  d.plain_operands(3);
  d.ins.mode = d.first_type == T_S32;
  d.ins.mode2 = d.types.size() > 1 ? d.types[1] == T_S32 : d.ins.mode;
  d.emit(h_dp4a, C_INT);
}
