// Opcodes of memory: loads, stores, copies, atomics, address spaces, mbarriers and tensor maps.
#pragma once
#include "decoder.h"
#include "tma.h"

static void decode_ld(Decoder& d) {
  d.need(2);
  Ins& ins = d.ins;
  ins.space = d.space();
  ins.elem_size = (u8)d.width;
  ins.sign = is_signed(d.type);
  if (!d.width || d.width > 8) d.unsupported();
  ins.list = d.vector_operand(d.operands[0], true);
  if (ins.space == SP_PARAM) {
    auto* v = d.builder.find_variable(d.operands[1].text);
    if (!v) throw SimError("unknown parameter '" + d.operands[1].text + "'");
    ins.imm = (s64)v->address + d.operands[1].offset;
    if (v->space == SP_PARAM) return d.emit(h_ldparam, C_PARAM);
    ins.space = SP_LOCAL;  // an argument of a call
    return d.emit(h_ld, C_PARAM);
  }
  d.address(d.operands[1]);
  d.emit(h_ld, ins.space == SP_SHARED ? C_LDSHARED : ins.space == SP_LOCAL ? C_LOCAL : C_LDGLOBAL);
}

static void decode_st(Decoder& d) {
  d.need(2);
  Ins& ins = d.ins;
  if (d.has("async")) d.unsupported();
  ins.space = d.space();
  ins.elem_size = (u8)d.width;
  if (!d.width || d.width > 8) d.unsupported();
  ins.list = d.vector_operand(d.operands[1], false);
  d.address(d.operands[0]);
  if (ins.space == SP_PARAM) ins.space = SP_LOCAL;
  d.emit(h_st, ins.space == SP_SHARED ? C_STSHARED : ins.space == SP_LOCAL ? C_LOCAL : C_STGLOBAL);
}

// ---------------------------------------------------------------- asynchronous copies
static const std::map<std::string, int> ATOMIC_OPS = {
    {"add", A_ADD}, {"min", A_MIN},   {"max", A_MAX}, {"and", A_AND}, {"or", A_OR},
    {"xor", A_XOR}, {"exch", A_EXCH}, {"cas", A_CAS}, {"inc", A_INC}, {"dec", A_DEC}};
static int atomic_op(const Decoder& d) {
  int found = -1;
  for (size_t i = 1; i < d.parts.size(); i++) {
    auto it = ATOMIC_OPS.find(d.parts[i]);
    if (it != ATOMIC_OPS.end()) found = it->second;
  }
  if (found < 0) d.unsupported();
  return found;
}

static void decode_cp_async_bulk(Decoder& d) {
  // Copies are done when they are issued, so there is nothing to commit or to wait for.
  if (d.has("commit_group") || d.has("wait_group") || d.has("prefetch")) return d.emit_control(K_NOP, C_BAR);
  for (auto* form : {"im2col", "tile::gather4", "tile::scatter4", "multicast::cluster"})
    if (d.has(form)) d.unsupported();
  if (!d.has("tensor")) d.unsupported();
  size_t global = 0, shared = 0;
  for (size_t k = 1; k < d.parts.size(); k++) {
    if (d.parts[k] == "global") global = k;
    if (d.parts[k].compare(0, 8, "shared::") == 0) shared = k;
  }
  bool load = shared < global, reduce = d.has("reduce");  // destination first
  d.need(load ? 3 : 2);
  const Operand &box = d.operands[load ? 0 : 1], &map = d.operands[load ? 1 : 0];
  std::vector<u32> addresses;
  d.append_address(addresses, box);
  d.append_address(addresses, map);
  if (load) d.append_address(addresses, d.operands[2]);
  d.ins.list = d.builder.list(addresses);
  if (map.parts.size() != 1) d.unsupported();
  std::vector<u32> coordinates = d.registers(map.parts[0], 4, false, T_S32);
  d.ins.list2 = d.builder.list(coordinates);
  d.ins.count = (u8)coordinates.size();
  d.ins.mode = (u8)(load ? TMA_LOAD : reduce ? TMA_REDUCE + atomic_op(d) : TMA_STORE);
  d.emit(h_tma, load ? C_CPASYNC : reduce ? C_ATOM : C_STGLOBAL);
}

static void decode_cp(Decoder& d) {
  Ins& ins = d.ins;
  if (d.has("bulk")) return decode_cp_async_bulk(d);
  if (!d.has("async") || d.has("mbarrier")) d.unsupported();
  if (d.has("commit_group")) return d.emit_sync(h_cpcommit, C_CPASYNC);
  if (d.has("wait_group")) {
    ins.imm = (s64)d.immediate(0);
    return d.emit_sync(h_cpwait, C_BAR);
  }
  if (d.has("wait_all")) {
    ins.mode = 1;
    return d.emit_sync(h_cpwait, C_BAR);
  }
  d.need(3);
  ins.space = SP_GLOBAL;
  d.address(d.operands[1]);
  const Operand& to = d.operands[0];
  ins.list = (u32)to.offset;
  ins.reg_size = 0;
  RegRef r;
  if (!to.text.empty() && d.builder.find_register(to.text, r)) {
    ins.reg_size = (u8)r.width;
    ins.slot[0] = r.slot;
  } else if (!to.text.empty()) {
    auto* v = d.builder.find_variable(to.text);
    if (!v) throw SimError("unknown symbol");
    ins.list += (u32)v->address;
  }
  ins.count = (u8)d.immediate(2);
  ins.slot[2] = d.builder.constant(4, ins.count);
  if (d.operands.size() > 3) {  // bytes to read, or whether to ignore the source
    const Operand& o = d.operands[3];
    bool is_register = o.kind != Operand::IMM && d.builder.find_register(o.text, r);
    if (o.kind == Operand::IMM || (is_register && r.width == 4)) {
      ins.slot[2] = d.source_u32(o);
      ins.flag = 1;
    } else if (is_register && r.width == 0) {
      ins.pred0 = (s32)r.slot;
      ins.mode = o.negated;
    }
  }
  d.emit(h_cpasync, C_CPASYNC);
}

// ---------------------------------------------------------------- mbarrier, tensormap
static void decode_mbarrier(Decoder& d) {
  Ins& ins = d.ins;
  std::vector<u32> address;
  auto& o = d.operands;
  if (d.has("inval")) return d.emit_control(K_NOP, C_BAR);
  if (d.has("init")) {
    ins.mode = MB_INIT;
    d.append_address(address, o[0]);
    ins.slot[2] = d.source_u32(o[1]);
  } else if (d.has("try_wait") || d.has("test_wait")) {
    if (!d.has("parity")) d.unsupported();
    ins.mode = MB_WAIT;
    ins.pred0 = d.builder.predicate(o[0].text);
    d.append_address(address, o[1]);
    ins.slot[2] = d.source_u32(o[2]);
  } else if (d.has("arrive")) {
    if (d.has("shared::cluster")) d.unsupported();
    bool has_result = o[0].kind != Operand::MEM;
    if (has_result && o[0].text != "_") d.unsupported();
    size_t k = has_result ? 1 : 0;
    ins.mode = d.has("expect_tx") ? MB_ARRIVE_EXPECT : MB_ARRIVE;
    d.append_address(address, o[k]);
    ins.slot[2] = o.size() > k + 1 ? d.source_u32(o[k + 1]) : d.builder.constant(4, 1);
  } else if (d.has("expect_tx")) {
    ins.mode = MB_EXPECT;
    d.append_address(address, o[0]);
    ins.slot[2] = d.source_u32(o[1]);
  } else {
    d.unsupported();
  }
  ins.list = d.builder.list(address);
  d.emit(h_mbar, C_BAR);
}

static void decode_tensormap(Decoder& d) {
  Ins& ins = d.ins;
  std::vector<u32> addresses;
  if (d.has("cp_fenceproxy")) {
    d.need(3);
    d.append_address(addresses, d.operands[0]);
    d.append_address(addresses, d.operands[1]);
    ins.list = d.builder.list(addresses);
    // Guarded, it is one thread's copy: it must not wait for the others.
    return ins.guard >= 0 ? d.emit(h_tensormap_copy, C_OTHER) : d.emit_sync(h_tensormap_copy, C_OTHER);
  }
  int field = d.which(TENSORMAP_FIELDS);
  if (field < 0) d.unsupported();
  ins.mode = (u8)field;
  d.append_address(addresses, d.operands[0]);
  ins.list = d.builder.list(addresses);
  int value = 1;
  if (field >= 2 && field <= 5) ins.imm = (s64)d.immediate(value++);
  ins.reg_size = (u8)d.width;
  d.source(2, value, d.width, d.type);
  d.emit(h_tensormap_replace, C_OTHER);
}

// ---------------------------------------------------------------- atomics, addresses
static void decode_atom(Decoder& d) {
  Ins& ins = d.ins;
  int op = atomic_op(d);
  if (d.has("async")) d.unsupported();
  ins.space = d.space();
  ins.mode = (u8)op;
  ins.mode2 = (u8)d.type;
  ins.elem_size = (u8)d.width;
  size_t k = 0;
  bool returns = d.is("atom");
  if (returns) ins.list = d.vector_operand(d.operands[k++], true);
  d.address(d.operands[k++]);
  ins.list2 = d.vector_operand(d.operands[k++], false);
  if (!returns) ins.list = d.builder.list(std::vector<u32>(ins.count, NO_SLOT));
  ins.reg_size = (u8)std::max(2, d.width);
  if (op == A_CAS) ins.slot[3] = d.builder.source(d.operands[k], ins.reg_size, d.type);
  d.emit(h_atom, C_ATOM);
}

static void decode_cvta(Decoder& d) {
  d.need(2);
  Ins& ins = d.ins;
  Space space = d.space();
  ins.reg_size = (u8)d.width;
  ins.imm = (s64)(space == SP_SHARED ? SHARED_BASE : space == SP_LOCAL ? LOCAL_BASE : space == SP_PARAM ? PARAM_BASE : 0);
  ins.mode = d.has("to");
  d.plain_operands(1);
  d.emit(h_cvta, C_MOV);
}

static void decode_isspacep(Decoder& d) {
  d.need(2);
  d.ins.pred0 = d.builder.predicate(d.operands[0].text);
  d.source(0, 1, 8, T_U64);
  Space space = d.space();
  d.ins.mode = space == SP_SHARED ? 1 : space == SP_LOCAL ? 2 : 0;
  d.emit(h_isspacep, C_PRED);
}

// Without clusters every shared address is one of the own CTA.
static void decode_mapa(Decoder& d) {
  d.need(2);
  d.plain_operands(1);
  d.emit(map1_of_width<Mov>(d.width), C_INT);
}

static void decode_createpolicy(Decoder& d) {
  d.need(1);
  d.destination(0, 8);
  d.ins.slot[1] = d.builder.constant(8, 0);
  d.emit(map1<Mov<u64>>, C_OTHER);
}
