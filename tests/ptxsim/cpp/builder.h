// Statements to a program: registers and variables get their places, functions are inlined, labels become code indices.
#pragma once
#include <set>

#include "parser.h"
#include "warp_ops.h"

struct RegRef {
  u32 slot = 0;  // number of a predicate
  int width = -1;  // bytes; 0: predicate
};
struct Variable {
  Space space;
  u64 address;
  u32 size;
};
// A { } block: names that it declares.
struct Scope {
  int id;
  std::map<std::string, RegRef> registers;
  std::map<std::string, int> ranges;  // .reg .b32 %r<9>: prefix and width; its registers get slots when they are used
  std::map<std::string, Variable> variables;
  std::map<std::string, std::vector<std::string>> branch_targets;
};

static const std::map<std::string, SpecialKind> SPECIALS = {{"%tid", SR_TID},
                                                            {"%ntid", SR_NTID},
                                                            {"%ctaid", SR_CTAID},
                                                            {"%nctaid", SR_NCTAID},
                                                            {"%laneid", SR_LANEID},
                                                            {"%warpid", SR_WARPID},
                                                            {"%nwarpid", SR_NWARPID},
                                                            {"%smid", SR_SMID},
                                                            {"%nsmid", SR_NSMID},
                                                            {"%gridid", SR_ZERO},
                                                            {"%lanemask_eq", SR_LANEMASK_EQ},
                                                            {"%lanemask_lt", SR_LANEMASK_LT},
                                                            {"%lanemask_le", SR_LANEMASK_LE},
                                                            {"%lanemask_gt", SR_LANEMASK_GT},
                                                            {"%lanemask_ge", SR_LANEMASK_GE},
                                                            {"%dynamic_smem_size", SR_SHARED_SIZE},
                                                            {"%total_smem_size", SR_SHARED_SIZE},
                                                            {"%clusterid", SR_CTAID},
                                                            {"%nclusterid", SR_NCTAID},
                                                            {"%cluster_ctaid", SR_ZERO},
                                                            {"%cluster_nctaid", SR_ONE},
                                                            {"%cluster_ctarank", SR_ZERO},
                                                            {"%cluster_nctarank", SR_ONE},
                                                            {"%is_explicit_cluster", SR_ZERO}};
static const u64 DYNAMIC_SHARED = 0xfffffffffull;  // stands for the address until the static part is known

class Builder {
 public:
  Builder(Module& m, Program& p) : module(m), P(p) { P.npred = 1; }  // predicate 0 is always false

  // ---------------------------------------------------------------- registers and constants
  u32 new_slot(int width) {
    u32 at = P.arena;
    P.arena += std::max(width * 32, 64);
    return at;
  }
  s32 new_predicate() { return P.npred++; }
  u32 constant(int width, u64 value) {
    if (width < 8) value &= ((u64)1 << (8 * width)) - 1;
    auto [it, is_new] = constants.try_emplace({width, value}, 0);
    if (is_new) {
      it->second = new_slot(width);
      P.constants.push_back({it->second, width, value});
    }
    return it->second;
  }
  // The kind and dimension of a special register, false for other names.
  static bool find_special(const std::string& name, SpecialKind* kind, int* dim) {
    bool has_dim = name.size() > 2 && name[name.size() - 2] == '.';
    *dim = has_dim ? name.back() - 'x' : 0;
    auto it = SPECIALS.find(has_dim ? name.substr(0, name.size() - 2) : name);
    *kind = it == SPECIALS.end() ? SR_ZERO : it->second;
    return it != SPECIALS.end() || name.compare(0, 7, "%envreg") == 0;
  }
  static bool is_special(const std::string& name) {
    SpecialKind kind;
    int dim;
    return find_special(name, &kind, &dim);
  }
  bool find_register(const std::string& name, RegRef& r) {
    std::string prefix = name;
    while (!prefix.empty() && is_digit(prefix.back())) prefix.pop_back();
    for (auto scope = scopes.rbegin(); scope != scopes.rend(); ++scope) {
      auto known = scope->registers.find(name);
      if (known != scope->registers.end()) {
        r = known->second;
        return true;
      }
      auto range = scope->ranges.find(prefix);
      if (range != scope->ranges.end() && prefix.size() < name.size()) {
        r = scope->registers[name] = new_register(range->second);
        return true;
      }
    }
    return false;
  }
  Variable* find_variable(const std::string& name) {
    for (auto scope = scopes.rbegin(); scope != scopes.rend(); ++scope) {
      auto it = scope->variables.find(name);
      if (it != scope->variables.end()) return &it->second;
    }
    auto it = module_variables.find(name);
    return it == module_variables.end() ? nullptr : &it->second;
  }

  // ---------------------------------------------------------------- operands to slots
  static u64 immediate(const std::string& text, Type t) {
    std::string s = text;
    bool negative = false;
    while (!s.empty() && (s[0] == '-' || s[0] == '+' || is_space(s[0]))) {
      if (s[0] == '-') negative = !negative;
      s = s.substr(1);
    }
    auto hex_float = [&](size_t size, char lower) { return s.size() == size && s[0] == '0' && tolower(s[1]) == lower; };
    if (hex_float(10, 'f')) {
      u32 b = (u32)strtoul(s.c_str() + 2, nullptr, 16);
      if (negative) b ^= 0x80000000u;
      return t == T_F64 ? bit_cast<u64>((double)as_float(b)) : b;
    }
    if (hex_float(18, 'd')) {
      u64 b = strtoull(s.c_str() + 2, nullptr, 16);
      if (negative) b ^= (u64)1 << 63;
      return t == T_F32 ? as_bits((float)bit_cast<double>(b)) : b;
    }
    bool hex = s.find_first_of("xX") != std::string::npos;
    if (s.find('.') != std::string::npos || (!hex && s.find_first_of("eE") != std::string::npos)) {
      double d = strtod(s.c_str(), nullptr);
      if (negative) d = -d;
      switch (t) {
        case T_F64: return bit_cast<u64>(d);
        case T_F16: return f32_to_f16_rn((float)d);
        case T_BF16: return f32_to_bf16_rn((float)d);
        default: return as_bits((float)d);
      }
    }
    char* end;
    u64 v = strtoull(s.c_str(), &end, 0);
    if (end == s.c_str()) throw SimError("bad immediate '" + text + "'");
    if (negative) v = 0 - v;
    if (t == T_F32 && v && !hex) return as_bits((float)(s64)v);
    if (t == T_F64 && v && !hex) return bit_cast<u64>((double)(s64)v);
    return v;
  }
  u32 source(const Operand& o, int width, Type t = T_NONE) {
    if (o.kind == Operand::IMM) return constant(width, immediate(o.text, t));
    if (o.kind == Operand::SYM) {
      auto* v = find_variable(o.text);
      if (!v) throw SimError("unknown symbol '" + o.text + "'");
      return constant(width, v->address + o.offset);
    }
    if (o.kind != Operand::REG) throw SimError("bad operand");
    if (is_special(o.text)) return special(o.text, width);
    if (o.text == "WARP_SZ") return constant(width, 32);
    RegRef r;
    if (find_register(o.text, r)) {
      if (r.width != width)
        throw SimError(fmt("operand %s has %d bytes, the instruction wants %d", o.text.c_str(), r.width, width));
      return r.slot;
    }
    if (auto* v = find_variable(o.text)) return constant(width, v->address);
    throw SimError("unknown register or symbol '" + o.text + "'");
  }
  u32 destination(const Operand& o, int width) {
    if (o.kind != Operand::REG) throw SimError("bad destination operand");
    if (o.text == "_") return new_slot(width);
    RegRef r = known_register(o.text);
    if (r.width != width)
      throw SimError(fmt("destination %s has %d bytes, the instruction wants %d", o.text.c_str(), r.width, width));
    return r.slot;
  }
  s32 predicate(const std::string& name) {
    if (name == "_") return new_predicate();
    RegRef r = known_register(name);
    if (r.width != 0) throw SimError("'" + name + "' is not a predicate");
    return (s32)r.slot;
  }
  // An immediate is predicate 0 or its opposite.
  s32 predicate_source(const Operand& o, bool& negated) {
    negated = o.negated;
    if (o.kind != Operand::IMM) return predicate(o.text);
    if (immediate(o.text, T_NONE)) negated = !negated;
    return 0;
  }
  std::vector<std::string> branch_targets(const std::string& label) {
    for (auto scope = scopes.rbegin(); scope != scopes.rend(); ++scope) {
      auto it = scope->branch_targets.find(label);
      if (it != scope->branch_targets.end()) return it->second;
    }
    return {};
  }

  // ---------------------------------------------------------------- code
  void emit(Ins ins) {
    ins.line = line;
    ins.loc = loc;
    P.code.push_back(ins);
  }
  u32 list(const std::vector<u32>& v) {
    u32 at = (u32)P.lists.size();
    P.lists.insert(P.lists.end(), v.begin(), v.end());
    return at;
  }
  // The next instruction jumps to `label`.
  void branch_to(const std::string& label) { branches.push_back({(int)P.code.size(), visible_scopes(), label}); }
  // Return of an inlined function; false in the kernel itself, which exits.
  bool branch_to_end() {
    if (in_entry) return false;
    branches.push_back({(int)P.code.size(), {function_scope}, END});
    return true;
  }
  // Entry `index` of Program::lists is the code index of `label`.
  void list_label(u32 index, const std::string& label) { listed.push_back({(int)index, visible_scopes(), label}); }

  void declare_variable(const std::string& declaration, bool in_module);
  void run_kernel(Function& f, const std::map<std::string, Variable>& params) {
    run_function(f, params, true);
    for (auto& b : branches) P.code[b.at].target = resolve(b);
    for (auto& b : listed) P.lists[b.at] = (u32)resolve(b);
  }
  void place_dynamic_shared(u64 address) {
    for (auto& v : module_variables)
      if (v.second.space == SP_SHARED && v.second.address == DYNAMIC_SHARED) v.second.address = address;
  }

 private:
  struct LabelUse {
    int at;
    std::vector<int> scopes;  // innermost first: labels are local to their { } block
    std::string label;
  };
  static constexpr const char* END = "$end";

  Module& module;
  Program& P;
  std::vector<Scope> scopes;
  std::map<std::string, Variable> module_variables;
  std::map<std::pair<int, u64>, u32> constants;
  std::map<std::pair<int, std::string>, u32> specials;
  std::map<std::pair<int, std::string>, int> labels;  // scope id and name to code index
  std::vector<LabelUse> branches, listed;
  int line = 0, loc = -1;
  int call_depth = 0, next_scope = 0, function_scope = 0;
  bool in_entry = true;

  RegRef new_register(int width) {
    RegRef r;
    r.width = width;
    r.slot = width ? new_slot(width) : (u32)new_predicate();
    return r;
  }
  RegRef known_register(const std::string& name) {
    RegRef r;
    if (!find_register(name, r)) throw SimError("unknown register '" + name + "'");
    return r;
  }
  u32 special(const std::string& name, int width) {
    auto [it, is_new] = specials.try_emplace({width, name}, 0);
    if (is_new) {
      it->second = new_slot(width);
      SpecialKind kind;
      int dim;
      find_special(name, &kind, &dim);
      P.specials.push_back({it->second, width, kind, dim});
    }
    return it->second;
  }

  void open_scope() {
    scopes.emplace_back();
    scopes.back().id = next_scope++;
  }
  std::vector<int> visible_scopes() const {
    std::vector<int> ids;
    for (auto scope = scopes.rbegin(); scope != scopes.rend(); ++scope) ids.push_back(scope->id);
    return ids;
  }
  int resolve(const LabelUse& use) const {
    for (int id : use.scopes) {
      auto it = labels.find({id, use.label});
      if (it != labels.end()) return it->second;
    }
    throw SimError("ptxsim: undefined label '" + use.label + "'");
  }

  // ".reg .b32 %r<5>, a"
  void declare_registers(const std::string& declaration) {
    std::string s = trim(declaration.substr(4));
    size_t end = 1;
    while (end < s.size() && is_identifier(s[end]) && s[end] != '.') end++;
    auto type = TYPES.find(s.substr(1, end - 1));
    if (type == TYPES.end()) throw SimError("unknown register type ." + s.substr(1, end - 1));
    int width = type->second == T_PRED ? 0 : std::max(2, type_size(type->second));
    for (auto& name : split_commas(s.substr(end))) {
      size_t bracket = name.find('<');
      if (bracket != std::string::npos) scopes.back().ranges[trim(name.substr(0, bracket))] = width;
      else scopes.back().registers[name] = new_register(width);
    }
  }

  // .loc file line column[, function_name x, inlined_at file line column]
  void set_location(const std::string& text) {
    Loc l{0, 0, 0, 0};
    sscanf(text.c_str(), " .loc %d %d", &l.file, &l.line);
    l.user_file = l.file;
    l.user_line = l.line;
    if (l.line == 0) return;
    size_t p = text.rfind("inlined_at");
    if (p != std::string::npos) {
      sscanf(text.c_str() + p, "inlined_at %d %d", &l.user_file, &l.user_line);
      // That place may have been inlined itself; it was then among the locations just before this one.
      int oldest = std::max(0, (int)P.locs.size() - 199);
      for (int k = (int)P.locs.size() - 1; k >= oldest; k--) {
        if (P.locs[k].file != l.user_file || P.locs[k].line != l.user_line) continue;
        l.user_file = P.locs[k].user_file;
        l.user_line = P.locs[k].user_line;
        break;
      }
    }
    P.locs.push_back(l);
    loc = (int)P.locs.size() - 1;
  }

  void run_function(Function& f, const std::map<std::string, Variable>& params, bool entry) {
    auto caller_scopes = std::move(scopes);
    int caller_scope = function_scope;
    bool caller_in_entry = in_entry;
    scopes.clear();
    open_scope();
    scopes.back().variables = params;
    function_scope = scopes.back().id;
    in_entry = entry;
    std::string last_label;
    for (auto& s : f.body) {
      line = s.line;
      switch (s.kind) {
        case Statement::OPEN: open_scope(); break;
        case Statement::CLOSE: scopes.pop_back(); break;
        case Statement::REGDECL: declare_registers(s.text); break;
        case Statement::VARDECL: declare_variable(s.text, false); break;
        case Statement::LABEL:
          labels[{scopes.back().id, s.text}] = (int)P.code.size();
          last_label = s.text;
          break;
        case Statement::TARGETS:
          scopes.back().branch_targets[last_label] = split_commas(s.text.substr(strlen(".branchtargets")));
          break;
        case Statement::LOC: set_location(s.text); break;
        case Statement::INSTR: instruction(s); break;
      }
    }
    if (entry) {
      Ins exit;
      exit.kind = K_EXIT;
      exit.cls = C_CTRL;
      exit.fn = h_nop;
      emit(exit);
    } else {
      labels[{function_scope, END}] = (int)P.code.size();
    }
    scopes = std::move(caller_scopes);
    function_scope = caller_scope;
    in_entry = caller_in_entry;
  }

  // What cannot be decoded is an error only if it is executed.
  void instruction(const Statement& st) {
    size_t at = P.code.size(), pending = branches.size();
    try {
      Ins ins = guarded(st);
      if (st.op.compare(0, 4, "call") == 0) guarded_call(ins, st);
      else decode(ins, st);
    } catch (SimError& e) {
      P.code.resize(at);
      branches.resize(pending);
      Ins ins;
      try {
        ins = guarded(st);
      } catch (SimError&) {
      }
      ins.fn = h_unsupported;
      P.messages.push_back(fmt("unsupported instruction '%s' (%s)", st.op.c_str(), e.what()));
      ins.text = (int)P.messages.size() - 1;
      emit(ins);
    }
  }
  Ins guarded(const Statement& st) {
    Ins ins;
    if (st.guard.empty()) return ins;
    ins.guard = predicate(st.guard);
    ins.guard_negated = st.guard_negated;
    return ins;
  }
  void decode(const Ins& guarded_ins, const Statement& st);  // decode.h

  void guarded_call(Ins skip, const Statement& st) {
    if (skip.guard < 0) return call(st);
    skip.kind = K_BRA;
    skip.cls = C_CTRL;
    skip.guard_negated = !skip.guard_negated;
    int scope = next_scope++;
    branches.push_back({(int)P.code.size(), {scope}, END});
    emit(skip);
    call(st);
    labels[{scope, END}] = (int)P.code.size();
  }

  Variable argument(const char* what, const std::string& name) {
    auto* v = find_variable(name);
    if (!v) throw SimError(std::string("call ") + what + " " + name);
    return *v;
  }
  // Calls are inlined: parameters of the function are names for the caller's variables.
  void call(const Statement& st) {
    auto inside = [](const std::string& s) { return split_commas(s.substr(1, s.rfind(')') - 1)); };
    std::vector<std::string> parts = split_commas(st.args), returns, arguments;
    std::string name;
    size_t k = 0;
    if (k < parts.size() && parts[k][0] == '(') returns = inside(parts[k++]);
    if (k < parts.size()) name = parts[k++];
    if (k < parts.size() && parts[k][0] == '(') arguments = inside(parts[k++]);
    if (name == "__assertfail" || name == "vprintf") {
      std::vector<u32> addresses;
      for (auto& x : arguments) addresses.push_back((u32)argument("argument", x).address);
      Ins ins;
      ins.list = list(addresses);
      ins.fn = name == "vprintf" ? h_vprintf : h_assert;
      return emit(ins);
    }
    Function* f = nullptr;
    for (auto& x : module.functions)
      if (x.name == name && x.has_body) f = &x;
    if (!f) throw SimError("call of unknown function '" + name + "'");
    if (++call_depth > 32) throw SimError("recursive call");
    std::map<std::string, Variable> bound;
    auto bind = [&](const std::string& declarations, const std::vector<std::string>& values, const char* what) {
      auto declared = split_commas(declarations);
      for (size_t i = 0; i < declared.size() && i < values.size(); i++) {
        std::string d = trim(declared[i].substr(0, declared[i].find('[')));
        bound[d.substr(d.find_last_of(" \t") + 1)] = argument(what, values[i]);
      }
    };
    bind(f->params, arguments, "argument");
    bind(f->returns, returns, "return");
    int call_line = line, call_loc = loc;
    run_function(*f, bound, false);
    line = call_line;
    loc = call_loc;
    call_depth--;
  }
};

// "[.extern] .shared|.global|... [.align n] .type name[n][m] [= {...}]"
struct Declaration {
  Space space = SP_NONE;
  u32 align = 1;
  Type type = T_NONE;
  u64 vector = 1, count = 1;
  bool external = false, open_ended = false;
  std::string name;
  std::vector<u64> init;

  u32 size() const { return (u32)(open_ended ? 0 : count * vector * std::max(1, type_size(type))); }

  // False for words without a known meaning.
  bool attribute(const std::string& w) {
    static const std::map<std::string, Space> SPACES = {
        {"shared", SP_SHARED}, {"global", SP_GLOBAL}, {"const", SP_CONST}, {"local", SP_LOCAL}, {"param", SP_PARAM}};
    static const std::set<std::string> LINKAGE = {"visible", "weak", "common"};
    if (SPACES.count(w)) space = SPACES.at(w);
    else if (w == "extern") external = true;
    else if (w == "v2" || w == "v4") vector = w[1] - '0';
    else if (TYPES.count(w)) type = TYPES.at(w);
    else return LINKAGE.count(w);
    return true;
  }

  // False if it is not a declaration of a variable.
  bool parse(const std::string& t) {
    size_t i = 0;
    auto spaces = [&] {
      while (i < t.size() && is_space(t[i])) i++;
    };
    auto word = [&](auto belongs) {
      size_t begin = i;
      while (i < t.size() && belongs(t[i])) i++;
      return t.substr(begin, i - begin);
    };
    for (spaces(); i < t.size() && t[i] == '.'; spaces()) {
      i++;
      std::string w = word([](char c) { return isalnum((unsigned char)c) || c == '_'; });
      if (w == "align") {
        spaces();
        align = (u32)strtoul(word(is_digit).c_str(), nullptr, 10);
      } else if (!attribute(w)) {
        return false;
      }
    }
    name = word(is_identifier);
    for (spaces(); i < t.size() && t[i] == '['; spaces()) {
      size_t end = t.find(']', i);
      std::string extent = trim(t.substr(i + 1, end - i - 1));
      if (extent.empty()) open_ended = true;
      else count *= strtoull(extent.c_str(), nullptr, 0);
      i = end + 1;
    }
    if (i < t.size() && t[i] == '=') {
      std::string value = trim(t.substr(i + 1));
      bool braces = !value.empty() && value[0] == '{';
      std::vector<std::string> values = {value};
      if (braces) values = split_commas(value.substr(1, value.rfind('}') - 1));
      for (auto& x : values) {
        bool symbol = braces && !is_digit(x[0]) && x[0] != '-';  // addresses of other variables stay null
        init.push_back(symbol ? 0 : Builder::immediate(x, type));
      }
    }
    return !name.empty() && space != SP_NONE;
  }
};

inline void Builder::declare_variable(const std::string& declaration, bool in_module) {
  Declaration d;
  if (!d.parse(declaration)) return;
  auto allot = [](u32& end, u32 align, u32 size) {
    u32 at = (end + align - 1) / align * align;
    end = at + size;
    return at;
  };
  Variable v{d.space, 0, d.size()};
  switch (d.space) {
    case SP_SHARED:
      v.address = d.external || d.open_ended ? DYNAMIC_SHARED : allot(P.static_shared, d.align, v.size);
      break;
    case SP_LOCAL: case SP_PARAM:  // .param inside a body holds the arguments of a call
      v.space = SP_LOCAL;
      v.address = allot(P.local_bytes, std::max(8u, d.align), v.size);
      break;
    default: {
      auto storage = std::make_unique<std::vector<u8>>(v.size + d.align + 64, 0);
      u8* p = (u8*)(((uintptr_t)storage->data() + d.align - 1) / d.align * d.align);
      u32 elem = std::max(1, type_size(d.type));
      for (size_t k = 0; k < d.init.size() && (k + 1) * elem <= v.size; k++) memcpy(p + k * elem, &d.init[k], elem);
      v.address = (u64)(uintptr_t)p;
      P.global_allocs.push_back({v.address, v.address + v.size, -1, nullptr, nullptr});
      P.globals.push_back(std::move(storage));
    }
  }
  (in_module ? module_variables : scopes.back().variables)[d.name] = v;
}

// ---------------------------------------------------------------- a whole program
// ".param .u64 .ptr .global .align 16 name" or ".param .align 64 .b8 name[128]"
static ParamInfo parse_parameter(const std::string& declaration, int end_of_previous) {
  ParamInfo p{"", 0, 0, 0};
  Type type = T_NONE;
  bool pointer = false;
  std::vector<std::string> words;
  std::string word;
  for (char c : declaration + " ") {
    if (!is_space(c)) word += c;
    else if (!word.empty()) words.push_back(std::move(word)), word.clear();
  }
  for (size_t k = 0; k < words.size(); k++) {
    const std::string& w = words[k];
    if (w == ".align") {
      if (!p.align) p.align = atoi(words[k + 1].c_str());
      k++;
    } else if (w == ".ptr") {
      pointer = true;
    } else if (w[0] != '.') {
      p.name = w;
    } else if (TYPES.count(w.substr(1))) {
      type = TYPES.at(w.substr(1));
    }
  }
  size_t bracket = p.name.find('[');
  if (bracket == std::string::npos) {
    p.size = p.align = type_size(type);
  } else {
    p.size = atoi(p.name.c_str() + bracket + 1) * type_size(type);
    p.name = p.name.substr(0, bracket);
    if (!p.align) p.align = type_size(type);
  }
  if (pointer) p.align = p.size;  // .align is then that of the memory it points to
  p.off = (end_of_previous + p.align - 1) / p.align * p.align;
  return p;
}

static std::vector<std::string> split_lines(const char* text) {
  std::vector<std::string> lines(1);
  for (const char* s = text; *s; s++) {
    if (*s == '\n') lines.emplace_back();
    else lines.back() += *s == '\t' ? ' ' : *s;
  }
  for (auto& l : lines) l = trim(l);
  return lines;
}

static std::unique_ptr<Program> build_program(const char* ptx, const char* entry) {
  Module M = ModuleParser(ptx).parse();
  std::string wanted = entry ? entry : "";
  auto P = std::make_unique<Program>();
  P->files = M.files;
  P->lines = split_lines(ptx);
  auto is_kernel = [&](const Function& f) { return f.entry && f.has_body && (wanted.empty() || f.name == wanted); };
  auto f = std::find_if(M.functions.begin(), M.functions.end(), is_kernel);
  if (f == M.functions.end()) throw SimError("ptxsim: no .entry '" + wanted + "' in the PTX");
  P->name = f->name;
  size_t block = f->attributes.find(".reqntid");
  if (block == std::string::npos) block = f->attributes.find(".maxntid");
  if (block != std::string::npos) {
    int *n = P->reqntid, size = (int)strlen(".reqntid");
    n[0] = n[1] = n[2] = 1;
    sscanf(f->attributes.c_str() + block + size, "%d , %d , %d", &n[0], &n[1], &n[2]);
  }
  for (auto& x : M.functions)
    for (auto& s : x.body)
      if (s.kind == Statement::VARDECL && s.text.find(".shared") != std::string::npos)
        throw SimError("ptxsim: function-level .shared variables are not supported");  // Triton emits none

  Builder builder(M, *P);
  auto declare = [&](bool external) {
    for (auto& v : M.variables)
      if ((v.text.find(".extern") != std::string::npos) == external) builder.declare_variable(v.text, true);
  };
  declare(false);
  P->static_shared = (P->static_shared + 127) / 128 * 128;
  declare(true);
  builder.place_dynamic_shared(P->static_shared);

  std::map<std::string, Variable> params;
  for (auto& declaration : split_commas(f->params)) {
    if (declaration.empty()) continue;
    ParamInfo p = parse_parameter(declaration, P->param_bytes);
    params[p.name] = Variable{SP_PARAM, (u64)p.off, (u32)p.size};
    P->param_bytes = p.off + p.size;
    P->params.push_back(p);
  }
  builder.run_kernel(*f, params);
  return P;
}
