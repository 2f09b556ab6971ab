// What the parser produces and the engine runs: a program is a flat list of decoded instructions.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "numeric.h"

struct SimError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum Type {
  T_NONE, T_PRED, T_B8, T_U8, T_S8, T_B16, T_U16, T_S16, T_F16, T_BF16, T_B32, T_U32, T_S32, T_F32, T_TF32, T_F16X2, T_BF16X2,
  T_U16X2, T_S16X2, T_B64, T_U64, T_S64, T_F64, T_B128, T_E4M3, T_E5M2, T_E4M3X2, T_E5M2X2, T_F32X2, T_U4, T_S4, T_B1
};
static const std::map<std::string, Type> TYPES = {
    {"pred", T_PRED},     {"b8", T_B8},         {"u8", T_U8},         {"s8", T_S8},       {"b16", T_B16},
    {"u16", T_U16},       {"s16", T_S16},       {"f16", T_F16},       {"bf16", T_BF16},   {"b32", T_B32},
    {"u32", T_U32},       {"s32", T_S32},       {"f32", T_F32},       {"tf32", T_TF32},   {"f16x2", T_F16X2},
    {"bf16x2", T_BF16X2}, {"u16x2", T_U16X2},   {"s16x2", T_S16X2},   {"b64", T_B64},     {"u64", T_U64},
    {"s64", T_S64},       {"f64", T_F64},       {"b128", T_B128},     {"e4m3", T_E4M3},   {"e5m2", T_E5M2},
    {"e4m3x2", T_E4M3X2}, {"e5m2x2", T_E5M2X2}, {"f32x2", T_F32X2},   {"u4", T_U4},       {"s4", T_S4},
    {"b1", T_B1}};

static int type_size(Type t) {
  switch (t) {
    case T_B8: case T_U8: case T_S8: case T_E4M3: case T_E5M2: return 1;
    case T_B16: case T_U16: case T_S16: case T_F16: case T_BF16: case T_E4M3X2: case T_E5M2X2: return 2;
    case T_B32: case T_U32: case T_S32: case T_F32: case T_TF32: return 4;
    case T_F16X2: case T_BF16X2: case T_U16X2: case T_S16X2: return 4;
    case T_B64: case T_U64: case T_S64: case T_F64: case T_F32X2: return 8;
    case T_B128: return 16;
    default: return 0;
  }
}
static bool is_signed(Type t) { return t == T_S8 || t == T_S16 || t == T_S32 || t == T_S64; }
static bool is_float(Type t) { return t == T_F16 || t == T_BF16 || t == T_F32 || t == T_F64; }

// The order is that of CLASSES in counters.py.
enum InsClass {
  C_MMA, C_LDGLOBAL, C_STGLOBAL, C_CPASYNC, C_ATOM, C_LDSHARED, C_STSHARED, C_LDMATRIX, C_SHFL, C_SFU, C_FP32, C_FP16, C_FP64,
  C_INT, C_CVT, C_MOV, C_PRED, C_CTRL, C_BAR, C_PARAM, C_LOCAL, C_OTHER
};
// How the engine steps over an instruction; K_SYNC waits for the lanes of its member mask.
enum Kind : u8 { K_NORMAL, K_BRA, K_EXIT, K_BAR, K_SYNC, K_BRX, K_TRAP, K_NOP };
enum BarMode { BAR_SYNC, BAR_ARRIVE, BAR_POPC, BAR_AND, BAR_OR };  // Ins::mode of K_BAR
enum Space : u8 { SP_GENERIC, SP_GLOBAL, SP_SHARED, SP_LOCAL, SP_PARAM, SP_CONST, SP_NONE };

// Special registers; SR_ONE and SR_ZERO are those that are fixed without clusters.
enum SpecialKind {
  SR_TID, SR_NTID, SR_CTAID, SR_NCTAID, SR_LANEID, SR_WARPID, SR_NWARPID, SR_SMID, SR_NSMID, SR_LANEMASK_EQ, SR_LANEMASK_LT,
  SR_LANEMASK_LE, SR_LANEMASK_GT, SR_LANEMASK_GE, SR_SHARED_SIZE, SR_ONE, SR_ZERO
};

// Generic addresses: no host pointer has these high bits, so one comparison tells the state space. A window starts at the
// address 0 of its space.
static const u64 SHARED_BASE = 0x7e00000000000000ull, LOCAL_BASE = 0x6e00000000000000ull, PARAM_BASE = 0x5e00000000000000ull;
static const u64 WINDOW = 1ull << 40;
INLINE bool in_window(u64 address, u64 base) { return address >= base && address < base + WINDOW; }

struct Ctx;
struct Ins;
typedef void (*Handler)(Ctx&, const Ins&);

// One decoded instruction. Registers are byte offsets ("slots") into the warp's register file, where the 32 lanes of a
// register lie next to each other; immediates are registers too, filled once per CTA. What the handlers read from the
// general fields (mode, flag, imm, list) is said at each handler.
static const u32 NO_SLOT = ~0u;
struct Ins {
  Handler fn = nullptr;
  u32 slot[6] = {0, 0, 0, 0, 0, 0};
  s32 guard = -1;   // predicate of @p, -1 for none
  s32 target = -1;  // code index a branch goes to
  s64 imm = 0;
  u32 list = 0, list2 = 0;  // starts of operand lists in Program::lists
  u8 count = 0;             // length of `list`
  u8 guard_negated = 0;
  u8 elem_size = 0, reg_size = 0, addr_size = 0;  // bytes of a memory element, of its register, of the address register
  u8 sign = 0, flag = 0, mode = 0, mode2 = 0;
  Kind kind = K_NORMAL;
  Space space = SP_NONE;
  u8 cls = C_OTHER;
  s32 line = 0;                              // PTX line
  s32 pred0 = -1, pred1 = -1, pred2 = -1;    // predicate operands
  s32 members = -1;                          // slot of a .sync instruction's member mask, -1 for all lanes
  u32 flops = 0;                             // per warp for matrix instructions, per thread for others
  s32 text = -1;                             // index of the message of an unsupported instruction
  s32 loc = -1;                              // index into Program::locs
};

struct Loc {
  int file, line;            // as in .loc
  int user_file, user_line;  // outermost caller: what the reader of an error message wrote
};

// A piece of global memory that the kernel may touch, with shadow memory where counters or checks are on.
struct Alloc {
  u64 lo, hi;
  int id;  // index of the name; -1 for the program's own globals
  u8 *sector_read, *sector_written;
  u32 *cta_wrote = nullptr, *cta_read = nullptr;  // linear CTA + 1 per byte; ~0 for several readers
  s32* line_wrote = nullptr;
};

// Counters per instruction; driver reads them as eight columns in this order.
struct Stat {
  u64 exec, lanes, bytes, sectors, ideal, wavefronts, ideal_wavefronts, divergent;
};

struct ParamInfo {
  std::string name;
  int off, size, align;
};

struct Program {
  struct Constant {
    u32 off;
    int width;
    u64 value;
  };
  struct Special {
    u32 off;
    int width;
    SpecialKind kind;
    int dim;
  };
  std::string name;
  std::vector<Ins> code;
  std::vector<u32> lists;
  std::vector<std::string> lines, messages;
  std::vector<Loc> locs;
  std::map<int, std::string> files;
  u32 arena = 0;  // bytes of a warp's register file
  int npred = 0;
  std::vector<Constant> constants;
  std::vector<Special> specials;
  std::vector<ParamInfo> params;
  int param_bytes = 0;
  u32 static_shared = 0, local_bytes = 0;
  int reqntid[3] = {0, 0, 0};
  std::vector<std::unique_ptr<std::vector<u8>>> globals;  // storage behind global_allocs
  std::vector<Alloc> global_allocs;
};
