// One statement to one instruction: what all opcodes need. The opcodes themselves are in decode_*.h.
#pragma once
#include "builder.h"

struct Decoder {
  Builder& builder;
  Ins ins;
  std::vector<std::string> parts;  // of the opcode, between its dots
  std::vector<Operand> operands;
  std::vector<Type> types;  // those among the parts
  Type first_type = T_NONE, type = T_NONE;  // first and last of them
  int width;                                // bytes of `type`
  int rounding = RNONE;

  Decoder(Builder& b, const Ins& guarded, const Statement& st) : builder(b), ins(guarded) {
    parts.emplace_back();
    for (char c : st.op) {
      if (c == '.') parts.emplace_back();
      else parts.back() += c;
    }
    for (auto& a : split_commas(st.args)) operands.push_back(parse_operand(a));
    for (size_t i = 1; i < parts.size(); i++) {
      auto it = TYPES.find(parts[i]);
      if (it != TYPES.end()) types.push_back(it->second);
    }
    if (!types.empty()) {
      first_type = types.front();
      type = types.back();
    }
    width = type_size(type);
    static const std::map<std::string, int> ROUNDINGS = {{"rn", RN},   {"rz", RZ},   {"rm", RM},   {"rp", RP},  {"rna", RNA},
                                                         {"rni", RNI}, {"rzi", RZI}, {"rmi", RMI}, {"rpi", RPI}};
    for (auto& x : parts)
      if (rounding == RNONE && ROUNDINGS.count(x)) rounding = ROUNDINGS.at(x);
  }

  const std::string& opcode() const { return parts[0]; }
  bool is(const char* name) const { return parts[0] == name; }
  bool has(const char* modifier) const { return std::find(parts.begin() + 1, parts.end(), modifier) != parts.end(); }
  // Index of the modifier that is present, -1 for none.
  template <size_t N> int which(const char* const (&modifiers)[N]) const {
    int found = -1;
    for (size_t k = 0; k < N; k++)
      if (has(modifiers[k])) found = (int)k;
    return found;
  }
  bool directed() const { return rounding == RZ || rounding == RM || rounding == RP; }

  [[noreturn]] void unsupported() const { throw SimError("no handler for this form"); }
  void need(size_t n) const {
    if (operands.size() < n) throw SimError(fmt("expected %zu operands, found %zu", n, operands.size()));
  }

  // ---------------------------------------------------------------- operands
  void destination(int operand, int w) { ins.slot[0] = builder.destination(operands[operand], w); }
  void source(int slot, int operand, int w, Type t) { ins.slot[slot] = builder.source(operands[operand], w, t); }
  u32 source_u32(const Operand& o) { return builder.source(o, 4, T_U32); }
  u64 immediate(int operand, Type t = T_U32) const { return Builder::immediate(operands[operand].text, t); }
  // Destination and n sources of the instruction's type.
  void plain_operands(int sources) {
    destination(0, width);
    for (int k = 1; k <= sources; k++) source(k, k, width, type);
  }
  // For handlers that read three sources: missing ones repeat the first.
  void up_to_three_sources() {
    destination(0, width);
    for (int k = 1; k < (int)operands.size() && k < 4; k++) source(k, k, width, type);
    if (operands.size() < 3) ins.slot[2] = ins.slot[1];
    if (operands.size() < 4) ins.slot[3] = ins.slot[1];
  }
  // {a, b, c} or a: slots of `ins.count` registers, whose common width becomes reg_size.
  u32 vector_operand(const Operand& o, bool is_destination) {
    std::vector<Operand> items = o.kind == Operand::VEC ? o.parts : std::vector<Operand>{o};
    int w = 0;
    for (auto& x : items) {
      RegRef r;
      if (x.kind == Operand::REG && x.text != "_" && builder.find_register(x.text, r)) w = std::max(w, r.width);
    }
    if (!w) w = std::max(2, (int)ins.elem_size);
    std::vector<u32> slots;
    for (auto& x : items) {
      if (!is_destination) slots.push_back(builder.source(x, w, type));
      else slots.push_back(x.text == "_" ? NO_SLOT : builder.destination(x, w));
    }
    ins.reg_size = (u8)w;
    ins.count = (u8)slots.size();
    return builder.list(slots);
  }
  std::vector<u32> registers(const Operand& o, int w, bool is_destination, Type t = T_NONE) {
    std::vector<Operand> items = o.kind == Operand::VEC ? o.parts : std::vector<Operand>{o};
    std::vector<u32> slots;
    for (auto& x : items) slots.push_back(is_destination ? builder.destination(x, w) : builder.source(x, w, t));
    return slots;
  }
  void address(const Operand& m) {
    if (m.kind != Operand::MEM) throw SimError("expected an address operand");
    ins.imm = m.offset;
    ins.addr_size = 0;
    if (m.text.empty()) return;
    RegRef r;
    if (builder.find_register(m.text, r)) {
      if (r.width != 4 && r.width != 8) throw SimError("bad address register");
      ins.addr_size = (u8)r.width;
      ins.slot[1] = r.slot;
      return;
    }
    auto* v = builder.find_variable(m.text);
    if (!v) throw SimError("unknown symbol '" + m.text + "' in address");
    ins.imm += (s64)v->address;
  }
  // As the triple that operand_address reads.
  void append_address(std::vector<u32>& list, const Operand& m) {
    if (m.kind != Operand::MEM) throw SimError("expected an address operand");
    RegRef r;
    u64 offset = (u64)m.offset;
    if (!m.text.empty() && !builder.find_register(m.text, r)) {
      auto* v = builder.find_variable(m.text);
      if (!v) throw SimError("unknown symbol '" + m.text + "'");
      offset += v->address;
    }
    list.insert(list.end(), {r.width > 0 ? (u32)r.width : 0u, r.slot, (u32)offset});
  }
  Space space() const {
    for (size_t i = 1; i < parts.size(); i++) {
      std::string x = parts[i].substr(0, parts[i].find("::"));
      if (x == "global") return SP_GLOBAL;
      if (x == "shared") return SP_SHARED;
      if (x == "local") return SP_LOCAL;
      if (x == "param") return SP_PARAM;
      if (x == "const") return SP_CONST;
    }
    return SP_GENERIC;
  }

  // ---------------------------------------------------------------- results
  InsClass float_class() const { return type == T_F64 ? C_FP64 : type == T_F32 ? C_FP32 : C_FP16; }
  void emit(Handler handler, InsClass cls) {
    if (!handler) unsupported();
    ins.fn = handler;
    ins.cls = (u8)cls;
    builder.emit(ins);
  }
  void emit_control(Kind kind, InsClass cls) {
    ins.kind = kind;
    emit(h_nop, cls);
  }
  // Waits for the lanes of a member mask.
  void emit_sync(Handler handler, InsClass cls) {
    ins.kind = K_SYNC;
    emit(handler, cls);
  }
};

// Handlers of templates over the width or the type of the operands.
#define SELECT(CONDITION, A, B) ((CONDITION) ? (Handler)(A) : (Handler)(B))
template <template <class> class Op> static Handler map2_of_type(Type t) {
  switch (t) {
    case T_U16: case T_B16: return map2<Op<u16>>;
    case T_S16: return map2<Op<s16>>;
    case T_U32: case T_B32: return map2<Op<u32>>;
    case T_S32: return map2<Op<s32>>;
    case T_U64: case T_B64: return map2<Op<u64>>;
    case T_S64: return map2<Op<s64>>;
    default: return nullptr;
  }
}
template <template <class> class Op> static Handler map2_of_width(int width) {
  switch (width) {
    case 2: return map2<Op<u16>>;
    case 4: return map2<Op<u32>>;
    case 8: return map2<Op<u64>>;
    default: return nullptr;
  }
}
template <template <class> class Op> static Handler map1_of_width(int width) {
  switch (width) {
    case 2: return map1<Op<u16>>;
    case 4: return map1<Op<u32>>;
    case 8: return map1<Op<u64>>;
    default: return nullptr;
  }
}
