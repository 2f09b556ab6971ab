// PTX text to statements: functions, their bodies, module-level variables. Operands stay text until the builder needs them.
#pragma once
#include "program.h"

struct Operand {
  enum Kind { REG, IMM, VEC, MEM, SYM, NONE } kind = NONE;
  std::string text;             // register, immediate or symbol; of MEM the base, which may be empty
  bool negated = false;         // !p
  std::vector<Operand> parts;   // of a vector; of MEM what follows the base after a comma: coordinates
  s64 offset = 0;
  std::string second;           // the q of p|q
};
struct Statement {
  enum Kind { INSTR, LABEL, REGDECL, VARDECL, OPEN, CLOSE, LOC, TARGETS } kind;
  int line;
  std::string text;
  std::string guard, op, args;  // of an instruction
  bool guard_negated = false;
};
struct Function {
  std::string name;
  bool entry = false, has_body = false;
  std::string params, returns, attributes;
  std::vector<Statement> body;
};
struct Module {
  std::vector<Function> functions;
  std::vector<Statement> variables;
  std::map<int, std::string> files;
};

static bool is_space(char c) { return isspace((unsigned char)c); }
static bool is_digit(char c) { return isdigit((unsigned char)c); }
static bool is_identifier(char c) { return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%' || c == '.'; }
static std::string trim(const std::string& s) {
  size_t a = s.find_first_not_of(" \t\r\n"), b = s.find_last_not_of(" \t\r\n");
  return a == std::string::npos ? "" : s.substr(a, b - a + 1);
}
// Parts between commas outside of brackets.
static std::vector<std::string> split_commas(const std::string& s) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (char c : s) {
    if (c == '{' || c == '[' || c == '(') depth++;
    if (c == '}' || c == ']' || c == ')') depth--;
    if (c == ',' && depth == 0) {
      parts.push_back(trim(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trim(part).empty()) parts.push_back(trim(part));
  return parts;
}

// ---------------------------------------------------------------- statements
class ModuleParser {
 public:
  explicit ModuleParser(const char* text) : s(text) { blank_comments(); }

  Module parse() {
    for (;;) {
      skip_spaces();
      if (at_end()) return std::move(module);
      std::string w = word();
      if (w == ".version" || w == ".address_size" || w == ".target" || w == ".loc" || w == ".pragma") rest_of_line();
      else if (w == ".file") parse_file();
      else if (w == ".section") skip_block();
      else if (function_keyword() != std::string::npos) parse_function(function_keyword());
      else parse_variable();
    }
  }

 private:
  std::string s;
  size_t i = 0;
  int line = 1;
  Module module;

  bool at_end() const { return i >= s.size(); }
  void advance(size_t n) {
    while (n-- && !at_end())
      if (s[i++] == '\n') line++;
  }
  void skip_spaces() {
    while (!at_end() && is_space(s[i])) advance(1);
  }
  std::string word() const {
    size_t end = i;
    while (end < s.size() && is_identifier(s[end])) end++;
    return s.substr(i, end - i);
  }
  std::string until(const char* stops) {
    std::string r;
    for (; !at_end() && !strchr(stops, s[i]); advance(1)) r += s[i];
    return r;
  }
  std::string rest_of_line() { return until("\n"); }
  std::string in_parentheses() {
    advance(1);
    std::string r = until(")");
    advance(1);
    return r;
  }

  // Lines stay where they are: messages refer to them.
  void blank_comments() {
    size_t n = s.size();
    for (size_t k = 0; k < n; k++) {
      if (s[k] == '"') {
        do k++;
        while (k < n && s[k] != '"');
      } else if (s.compare(k, 2, "//") == 0) {
        for (; k < n && s[k] != '\n'; k++) s[k] = ' ';
      } else if (s.compare(k, 2, "/*") == 0) {
        size_t end = std::min(s.find("*/", k), n - 2) + 2;
        for (; k < end; k++)
          if (s[k] != '\n') s[k] = ' ';
        k--;
      }
    }
  }

  void parse_file() {
    std::string text = rest_of_line();
    size_t a = text.find('"'), b = text.find('"', a + 1);
    if (a != std::string::npos && b != std::string::npos) module.files[atoi(text.c_str() + 5)] = text.substr(a + 1, b - a - 1);
  }
  void skip_block() {
    int depth = 0;
    for (; !at_end(); advance(1)) {
      if (s[i] == '{') depth++;
      if (s[i] == '}' && --depth == 0) return advance(1);
    }
  }
  // Where .entry or .func stands in the declaration that begins here, npos if it declares a variable.
  size_t function_keyword() const {
    for (size_t p = i; p < s.size() && s[p] != ';' && s[p] != '{'; p++)
      if (s.compare(p, 6, ".entry") == 0 || s.compare(p, 5, ".func") == 0) return p;
    return std::string::npos;
  }

  // A statement up to its semicolon; semicolons in brackets belong to it.
  std::string statement_text(const char* opening, const char* closing) {
    std::string r;
    int depth = 0;
    for (; !at_end(); advance(1)) {
      char c = s[i];
      if (strchr(opening, c)) depth++;
      if (strchr(closing, c)) depth--;
      if (c == ';' && depth <= 0) {
        advance(1);
        break;
      }
      r += c == '\n' ? ' ' : c;
    }
    return trim(r);
  }
  void parse_variable() {
    Statement v;
    v.kind = Statement::VARDECL;
    v.line = line;
    v.text = statement_text("{", "}");
    module.variables.push_back(v);
  }

  void parse_function(size_t keyword) {
    Function f;
    f.entry = s.compare(keyword, 6, ".entry") == 0;
    advance(keyword - i + (f.entry ? 6 : 5));
    skip_spaces();
    if (s[i] == '(') {
      f.returns = in_parentheses();
      skip_spaces();
    }
    f.name = word();
    advance(f.name.size());
    skip_spaces();
    if (!at_end() && s[i] == '(') f.params = in_parentheses();
    f.attributes = until("{;");
    f.has_body = !at_end() && s[i] == '{';
    advance(1);
    if (f.has_body) parse_body(f);
    module.functions.push_back(f);
  }

  void parse_body(Function& f) {
    for (int depth = 1; depth > 0;) {
      skip_spaces();
      if (at_end()) throw SimError("ptxsim: PTX parse error: unexpected end of file");
      if (s[i] == ';') {
        advance(1);
        continue;
      }
      Statement t;
      t.line = line;
      if (s[i] == '{' || s[i] == '}') {
        t.kind = s[i] == '{' ? Statement::OPEN : Statement::CLOSE;
        depth += s[i] == '{' ? 1 : -1;
        advance(1);
        if (depth) f.body.push_back(t);
        continue;
      }
      std::string w = word();
      size_t end = i + w.size();
      if (w == ".file") {
        parse_file();
      } else if (w == ".loc") {
        t.kind = Statement::LOC;
        t.text = rest_of_line();
        f.body.push_back(t);
      } else if (!w.empty() && w[0] != '.' && end + 1 < s.size() && s[end] == ':' && s[end + 1] != ':') {
        t.kind = Statement::LABEL;
        t.text = w;
        advance(w.size() + 1);
        f.body.push_back(t);
      } else {
        t.text = statement_text("{([", "})]");
        if (classify(t, w)) f.body.push_back(t);
      }
    }
  }

  // False for directives without a meaning here.
  bool classify(Statement& t, const std::string& first_word) {
    if (t.text[0] != '.') {
      t.kind = Statement::INSTR;
      split_instruction(t);
      return true;
    }
    if (first_word == ".reg") t.kind = Statement::REGDECL;
    else if (first_word == ".branchtargets") t.kind = Statement::TARGETS;
    else t.kind = Statement::VARDECL;
    return first_word != ".pragma" && first_word != ".callprototype";
  }
  static void split_instruction(Statement& t) {
    const std::string& r = t.text;
    size_t q = 0;
    auto spaces = [&] {
      while (q < r.size() && is_space(r[q])) q++;
    };
    if (r[0] == '@') {
      q++;
      spaces();
      if (r[q] == '!') {
        t.guard_negated = true;
        q++;
        spaces();
      }
      while (q < r.size() && is_identifier(r[q])) t.guard += r[q++];
      spaces();
    }
    while (q < r.size() && (is_identifier(r[q]) || r[q] == ':')) t.op += r[q++];
    t.args = trim(r.substr(q));
  }
};

// ---------------------------------------------------------------- operands
static Operand parse_operand(const std::string& text);

// [base + offset - ...], [base, {coordinates}]
static Operand parse_memory_operand(const std::string& inside) {
  Operand o;
  o.kind = Operand::MEM;
  std::string t = inside;
  auto parts = split_commas(t);
  if (parts.size() > 1) t = parts[0];
  for (size_t k = 1; k < parts.size(); k++) o.parts.push_back(parse_operand(parts[k]));
  size_t p = 0;
  if (t[0] == '%' || isalpha((unsigned char)t[0]) || t[0] == '_' || t[0] == '$')
    while (p < t.size() && is_identifier(t[p])) p++;
  o.text = t.substr(0, p);
  std::string sum;
  for (char c : t.substr(p))
    if (!is_space(c)) sum += c;
  for (size_t q = 0; q < sum.size();) {
    int sign = 1;
    for (; q < sum.size() && (sum[q] == '+' || sum[q] == '-'); q++)
      if (sum[q] == '-') sign = -sign;
    if (q >= sum.size()) break;
    char* end;
    s64 term = (s64)strtoull(sum.c_str() + q, &end, 0);
    if (end == sum.c_str() + q) throw SimError("ptxsim: bad address expression [" + t + "]");
    o.offset += sign * term;
    q = end - sum.c_str();
  }
  return o;
}

static Operand parse_operand(const std::string& text) {
  std::string s = trim(text);
  Operand o;
  if (s.empty()) return o;
  auto inside = [&](char closing) { return s.substr(1, s.rfind(closing) - 1); };
  if (s[0] == '!') {
    o = parse_operand(s.substr(1));
    o.negated = true;
    return o;
  }
  if (s[0] == '{') {
    o.kind = Operand::VEC;
    for (auto& x : split_commas(inside('}'))) o.parts.push_back(parse_operand(x));
    return o;
  }
  if (s[0] == '[') return parse_memory_operand(trim(inside(']')));
  size_t bar = s.find('|'), plus = s.find('+');
  o.kind = Operand::REG;
  o.text = s;
  if (is_digit(s[0]) || s[0] == '-' || s[0] == '+') {
    o.kind = Operand::IMM;
  } else if (bar != std::string::npos) {
    o.text = trim(s.substr(0, bar));
    o.second = trim(s.substr(bar + 1));
  } else if (plus != std::string::npos) {
    o.kind = Operand::SYM;
    o.text = trim(s.substr(0, plus));
    o.offset = strtoll(s.c_str() + plus + 1, nullptr, 0);
  }
  return o;
}
