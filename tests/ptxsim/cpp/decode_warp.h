// Opcodes of control flow, of synchronisation, and of the lanes of a warp.
#pragma once
#include "decoder.h"

static void decode_bra(Decoder& d) {
  d.need(1);
  d.builder.branch_to(d.operands[0].text);
  d.emit_control(K_BRA, C_CTRL);
}
static void decode_brx(Decoder& d) {
  d.need(2);
  d.ins.slot[0] = d.builder.source(d.operands[0], 4);
  auto targets = d.builder.branch_targets(d.operands[1].text);
  if (targets.empty()) d.unsupported();
  d.ins.count = (u8)targets.size();
  d.ins.list = d.builder.list(std::vector<u32>(targets.size(), 0));
  for (size_t k = 0; k < targets.size(); k++) d.builder.list_label(d.ins.list + (u32)k, targets[k]);
  d.emit_control(K_BRX, C_CTRL);
}
static void decode_ret(Decoder& d) { d.emit_control(d.builder.branch_to_end() ? K_BRA : K_EXIT, C_CTRL); }
static void decode_exit(Decoder& d) { d.emit_control(K_EXIT, C_CTRL); }
static void decode_trap(Decoder& d) {
  d.ins.kind = K_TRAP;
  d.emit(h_trap, C_CTRL);
}
// Memory is coherent here, and there is no timing.
static void decode_fence(Decoder& d) { d.emit_control(K_NOP, C_BAR); }
static void decode_hint(Decoder& d) { d.emit_control(K_NOP, C_OTHER); }

static void decode_bar(Decoder& d) {
  Ins& ins = d.ins;
  auto& o = d.operands;
  if (d.has("warp")) {
    ins.members = (s32)d.source_u32(o[0]);
    return d.emit_sync(h_nop, C_BAR);
  }
  if (d.has("cluster")) d.unsupported();
  size_t k = 0;
  if (d.has("red")) {
    ins.mode = d.has("popc") ? BAR_POPC : d.has("and") ? BAR_AND : BAR_OR;
    if (ins.mode == BAR_POPC) {
      d.need(3);
      ins.slot[2] = d.builder.destination(o[0], 4);
    } else {
      ins.pred0 = d.builder.predicate(o[0].text);
    }
    ins.pred1 = d.builder.predicate(o.back().text);
    ins.mode2 = o.back().negated;
    o.pop_back();
    k = 1;
  } else {
    ins.mode = d.has("arrive") ? BAR_ARRIVE : BAR_SYNC;
  }
  ins.slot[0] = d.source_u32(o[k]);
  if (o.size() > k + 1) {
    ins.slot[1] = d.source_u32(o[k + 1]);
    ins.flag = 1;
  }
  d.emit_control(K_BAR, C_BAR);
}

static void decode_shfl(Decoder& d) {
  static const char* const MODES[] = {"up", "down", "bfly"};
  d.need(4);
  if (!d.has("sync")) d.unsupported();
  Ins& ins = d.ins;
  auto& o = d.operands;
  int mode = d.which(MODES);
  ins.mode = (u8)(mode < 0 ? SHFL_IDX : mode);
  d.destination(0, 4);
  if (!o[0].second.empty() && o[0].second != "_") ins.pred0 = d.builder.predicate(o[0].second);
  for (int k = 1; k < 4; k++) d.source(k, k, 4, T_B32);
  ins.members = (s32)(o.size() > 4 ? d.builder.source(o[4], 4, T_B32) : d.builder.constant(4, FULL));
  bool fixed = o[2].kind == Operand::IMM && o[3].kind == Operand::IMM && ins.pred0 < 0;
  if (!fixed) return d.emit_sync(h_shfl, C_SHFL);
  std::vector<u32> table;
  EACH_LANE(i) {
    int from;
    shuffle_source(ins.mode, i, (u32)d.immediate(2), (u32)d.immediate(3), &from);
    table.push_back((u32)from);
  }
  ins.list = d.builder.list(table);
  d.emit_sync(h_shfl_table, C_SHFL);
}

static void decode_vote(Decoder& d) {
  static const char* const MODES[] = {"any", "all", "uni"};
  d.need(2);
  Ins& ins = d.ins;
  int mode = d.which(MODES);
  ins.mode = (u8)(mode < 0 ? VOTE_BALLOT : mode);
  if (mode < 0) d.destination(0, 4);
  else ins.pred0 = d.builder.predicate(d.operands[0].text);
  bool negated;
  ins.pred1 = d.builder.predicate_source(d.operands[1], negated);
  ins.flag = negated;
  ins.members = (s32)(d.operands.size() > 2 ? d.builder.source(d.operands[2], 4, T_B32) : d.builder.constant(4, FULL));
  d.emit_sync(h_vote, C_SHFL);
}

static void decode_match(Decoder& d) {
  d.need(3);
  Ins& ins = d.ins;
  ins.reg_size = (u8)d.width;
  d.destination(0, 4);
  if (!d.operands[0].second.empty()) ins.pred0 = d.builder.predicate(d.operands[0].second);
  d.source(1, 1, d.width, d.type);
  ins.members = (s32)d.builder.source(d.operands[2], 4, T_B32);
  ins.mode = d.has("all");
  d.emit_sync(h_match, C_SHFL);
}

static void decode_redux(Decoder& d) {
  static const char* const MODES[] = {"add", "min", "max", "and", "or", "xor"};  // in the order of AtomicOp
  d.need(3);
  Ins& ins = d.ins;
  d.destination(0, 4);
  d.source(1, 1, 4, d.type);
  ins.members = (s32)d.builder.source(d.operands[2], 4, T_B32);
  ins.mode = (u8)d.which(MODES);
  ins.flag = d.has("NaN");
  ins.mode2 = (u8)d.type;
  d.emit_sync(h_redux, C_SHFL);
}

static void decode_activemask(Decoder& d) {
  d.destination(0, 4);
  d.emit(h_activemask, C_SHFL);
}

static void decode_elect(Decoder& d) {
  Ins& ins = d.ins;
  ins.slot[0] = d.operands[0].text == "_" ? NO_SLOT : d.builder.destination(d.operands[0], 4);
  ins.pred0 = d.builder.predicate(d.operands[0].second);
  ins.members = (s32)d.builder.source(d.operands[1], 4, T_B32);
  d.emit_sync(h_elect, C_SHFL);
}
