// The machine that executes PTX on a CPU: kernels as they were parsed, threads in warps and blocks, findings.
//
// parse.cpp reads a library's PTX, instructions.cpp has the table of instructions, memory.cpp checks each
// access, execute.cpp runs warps, blocks and launches in the place of libcudart. Words are those of the PTX
// ISA manual.
#pragma once
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <utility>
#include <vector>

using std::string;
using std::vector;
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef float f32;

struct Dim { u32 x, y, z; };

struct Options {
    int mma;      // 1: sums of mma are truncated to the largest term, as by tensor cores; 0: rounded once
    int approx;   // 1: ex2.approx and rcp.approx are as wrong as the manual allows
    int reverse;  // 1: warps and blocks run from the last to the first
    int traffic;  // 1: count what accesses of memory cost
};
extern Options options;

// MEMBERS wait for the lanes of a membermask, ALIGNED for the warp
enum Kind : u8 { PLAIN, BRA, RET, TRAP, UNKNOWN, MEMBERS, ALIGNED, BARRIER };
enum Space : u8 { PARAM, SHARED, GLOBAL };

// a place in a warp's registers; offset: of an address
struct Operand { u32 at = 0; u8 width = 0; s64 offset = 0; };
struct Warp;
struct Instruction;
struct Allocation;
typedef void (*Run)(Warp&, const Instruction&, u32 lanes);

struct Instruction {
    Run run = nullptr;
    Kind kind = PLAIN;
    Space space = GLOBAL;
    u8 vector = 1, size = 4;  // of ld and st: numbers, bytes of each
    bool is_signed = false, negated = false;
    bool skipped = false;   // left out, to see whether that is found
    u16 used = 0xffff;      // bytes of a load
    s32 guard = -1;         // place of the predicate
    s32 target = -1;        // of a branch
    Operand o[16];
    int operands = 0;
    string text, where;
    mutable u64 hits = 0;
    mutable u64 parts = 0, least = 0;    // of its accesses: see count_traffic
    mutable Allocation* last = nullptr;  // the last that it touched, while allocations are of this generation
    mutable u64 generation = 0;
};

struct Module {
    const char* fat_binary;
    bool read = false;
    string text;
    std::map<int, string> files;      // of .loc
    std::map<string, string> shared;  // declarations outside of kernels
    std::map<string, string> entries;
};
struct Constant { u32 at; u8 width; u64 bits; };
struct Kernel {
    string name;
    const Module* module;
    bool parsed = false;
    vector<u32> param_at, param_size;
    u32 param_bytes = 0;
    vector<Instruction> code;
    u32 register_bytes = 0;
    vector<Constant> constants;
    u32 tid[3], ctaid[3], ntid[3], nctaid[3], laneid;  // places of special registers
    vector<std::pair<u32, u32>> shared;                 // address and size of each static variable
    u32 static_shared = 0, shared_end = 0, dynamic_at = 0;
    u32 maxntid = 0;
    u64 launches = 0;
};
void read_module(Module&);
void parse(Kernel&);
[[noreturn]] void fatal(const string& message);

// The row of an instruction in the table: widths of operands in bytes, for those that are written as numbers.
struct Entry { Run run; vector<u8> width; Kind kind = PLAIN; };
const Entry* find_instruction(const string& opcode);
extern const Run ld, st, mov, pack, unpack;

typedef u64 Tag;  // who touched a byte, and when: see memory.cpp
// a cp.async on its way; known: which of its 16 bytes hold something
struct Copy { u32 to; const u8* from; u16 known; };
struct Block;
struct Warp {
    Block* block;
    int id;
    u32 live = 0, exited = 0, waiting = 0;
    u32 pc[32];
    u8* registers;
    u64 sync = 0;  // clock of the last bar.warp.sync
    vector<Copy> open[32];
    vector<vector<Copy>> groups[32];  // committed, the oldest first
    template <class T> T* reg(const Operand& o) const { return (T*)(registers + o.at); }
};
struct Block {
    const Kernel* kernel;
    Dim index;
    vector<Warp> warps;
    vector<u8> shared, valid, params;
    vector<Tag> written, read;      // of shared memory
    u64 launched, started, barrier;  // clocks
    bool dead = false;
};

extern u64 now;  // the clock; it ticks at barriers, blocks and launches

struct Finding { string kind, kernel, where, instruction, example; u64 count; };
extern std::map<std::pair<const void*, string>, Finding> findings;
void report(const string& kind, const Warp&, const Instruction&, int lane, const string& detail = "");

// ---- memory.cpp ----
constexpr u64 ASYNC = 1 << 13;  // in a tag: a cp.async is on its way
inline Tag tag_of(const Warp& w, int lane) { return now << 16 | (u64)(w.id * 32 + lane); }
u8* access(Warp&, const Instruction&, int lane, Space, u64 address, u32 bytes, const u8* data, u32 used = ~0u,
    u16* known = nullptr);
void count_traffic(const Warp&, const Instruction&, const Operand& base, u32 lanes, u32 bytes, Space);
string place_in_allocation(const Instruction&, u64 address);

template <class F> static inline void each(u32 lanes, F f) {
    if (lanes == ~0u) {
#pragma GCC ivdep
        for (int l = 0; l < 32; l++) f(l);
    } else {
        for (u32 m = lanes; m; m &= m - 1) f(__builtin_ctz(m));
    }
}
static inline int first_of(u32 lanes) { return __builtin_ctz(lanes); }

static inline void put(const Warp& w, const Operand& o, int lane, u64 bits) {
    switch (o.width) {
        case 1: w.reg<u8>(o)[lane] = (u8)bits; break;
        case 2: w.reg<u16>(o)[lane] = (u16)bits; break;
        case 4: w.reg<u32>(o)[lane] = (u32)bits; break;
        default: w.reg<u64>(o)[lane] = bits;
    }
}
static inline u64 get(const Warp& w, const Operand& o, int lane) {
    switch (o.width) {
        case 1: return w.reg<u8>(o)[lane];
        case 2: return w.reg<u16>(o)[lane];
        case 4: return w.reg<u32>(o)[lane];
        default: return w.reg<u64>(o)[lane];
    }
}
static inline u64 address_of(const Warp& w, const Operand& o, int lane) {
    return (o.width == 4 ? (u64)w.reg<u32>(o)[lane] : w.reg<u64>(o)[lane]) + o.offset;
}
