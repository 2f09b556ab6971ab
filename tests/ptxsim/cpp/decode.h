// The table of opcodes.
#pragma once
#include "decode_arith.h"
#include "decode_matrix.h"
#include "decode_memory.h"
#include "decode_warp.h"

typedef void (*DecodeFunction)(Decoder&);

// Opcodes that mean the same for all types.
static const std::map<std::string, DecodeFunction> OPCODES = {
    {"bra", decode_bra},
    {"brx", decode_brx},
    {"ret", decode_ret},
    {"exit", decode_exit},
    {"trap", decode_trap},
    {"membar", decode_fence},
    {"fence", decode_fence},
    {"nanosleep", decode_hint},
    {"prefetch", decode_hint},
    {"prefetchu", decode_hint},
    {"discard", decode_hint},
    {"applypriority", decode_hint},
    {"griddepcontrol", decode_hint},
    {"setmaxnreg", decode_hint},
    {"brkpt", decode_hint},
    {"pmevent", decode_hint},
    {"bar", decode_bar},
    {"barrier", decode_bar},
    {"ld", decode_ld},
    {"ldu", decode_ld},
    {"st", decode_st},
    {"cp", decode_cp},
    {"mbarrier", decode_mbarrier},
    {"tensormap", decode_tensormap},
    {"atom", decode_atom},
    {"red", decode_atom},
    {"createpolicy", decode_createpolicy},
    {"cvta", decode_cvta},
    {"isspacep", decode_isspacep},
    {"mapa", decode_mapa},
    {"shfl", decode_shfl},
    {"vote", decode_vote},
    {"match", decode_match},
    {"redux", decode_redux},
    {"activemask", decode_activemask},
    {"elect", decode_elect},
    {"ldmatrix", decode_ldmatrix},
    {"stmatrix", decode_ldmatrix},
    {"mma", decode_mma},
    {"wgmma", decode_wgmma},
    {"setp", decode_setp},
    {"set", decode_set},
    {"testp", decode_testp},
    {"selp", decode_selp},
    {"mov", decode_mov},
    {"cvt", decode_cvt},
    {"addc", decode_carry},
    {"subc", decode_carry},
    {"madc", decode_carry},
};
static const std::map<std::string, DecodeFunction> INTEGER_OPCODES = {
    {"add", decode_int_two},   {"sub", decode_int_two},   {"min", decode_int_two},    {"max", decode_int_two},
    {"div", decode_int_two},   {"rem", decode_int_two},   {"and", decode_bitwise},    {"or", decode_bitwise},
    {"xor", decode_bitwise},   {"mul", decode_int_mul},   {"mad", decode_int_mad},    {"shl", decode_shift},
    {"shr", decode_shift},     {"not", decode_int_one},   {"cnot", decode_int_one},   {"neg", decode_int_one},
    {"abs", decode_int_one},   {"brev", decode_int_one},  {"popc", decode_bit_count}, {"clz", decode_bit_count},
    {"bfind", decode_bit_count}, {"bfe", decode_bit_field}, {"bfi", decode_bit_field},  {"prmt", decode_prmt},
    {"lop3", decode_lop3},     {"shf", decode_shf},       {"dp4a", decode_dp4a},
};

static DecodeFunction arithmetic(const Decoder& d) {
  switch (d.type) {
    case T_PRED: return decode_predicate_logic;
    case T_F16: case T_BF16: case T_F16X2: case T_BF16X2: return decode_half;
    case T_F32: return decode_f32;
    case T_F64: return decode_f64;
    case T_U16X2: case T_S16X2: return decode_int_pair;
    default: break;
  }
  if (d.has("cc")) return decode_carry;
  auto it = INTEGER_OPCODES.find(d.opcode());
  if (it == INTEGER_OPCODES.end()) throw SimError("unknown instruction");
  return it->second;
}

inline void Builder::decode(const Ins& guarded_ins, const Statement& st) {
  Decoder d(*this, guarded_ins, st);
  auto it = OPCODES.find(d.opcode());
  (it == OPCODES.end() ? arithmetic(d) : it->second)(d);
}
