// Warps, blocks and launches, in the place of libcudart: grid, block, shared memory, stream and arguments
// come from the library's own host code.
//
// A warp runs in lockstep as far as its lanes are together: of the lanes that can go on, those with the
// smallest pc do, so lanes meet again where branches join. Instructions with a membermask wait for its lanes,
// bar.sync waits for the block.
#include <algorithm>
#include <memory>
#include <sstream>

#include "machine.h"

std::map<std::pair<const void*, string>, Finding> findings;

void report(const string& kind, const Warp& w, const Instruction& i, int lane, const string& detail) {
    Finding& f = findings[{&i, kind}];
    if (f.count++) return;
    const Block& b = *w.block;
    std::ostringstream s;
    s << "block " << b.index.x << "," << b.index.y << "," << b.index.z << " thread " << w.id * 32 + lane
      << ": " << detail;
    f = {kind, b.kernel->name, i.where, i.text, s.str(), 1};
}

// ---- a warp ----
enum Stop { DONE, AT_BARRIER, STUCK };

static void move(Warp& w, u32 lanes, u32 to) {
    for (u32 m = lanes; m; m &= m - 1) w.pc[first_of(m)] = to;
}

// Executes the instruction at which lanes wait, if all that it waits for are there; returns which these were.
static u32 meet(Warp& w, u32 pc) {
    const Instruction& i = w.block->kernel->code[pc];
    const u32 present = w.live & ~w.exited;
    u32 here = 0;
    for (u32 m = w.waiting; m; m &= m - 1)
        if (w.pc[first_of(m)] == pc) here |= m & -m;
    if (i.kind == BARRIER) return 0;
    u32 wanted = present;
    if (i.kind == ALIGNED) {
        if (present != ~0u) report("aligned instruction without all lanes", w, i, first_of(here));
    } else {
        const u32* membermask = w.reg<u32>(i.o[i.operands - 1]);
        const u32 mask = membermask[first_of(here)];
        for (u32 m = here; m; m &= m - 1) {
            const int l = first_of(m);
            if (!(membermask[l] >> l & 1)) report("a lane is not in its own mask", w, i, l);
            if (membermask[l] != mask) report("masks differ", w, i, l);
        }
        if (mask & ~w.live) report("mask names threads that the block has not", w, i, first_of(here));
        if (mask & w.exited) report("mask names lanes that have ended", w, i, first_of(here));
        wanted = mask & present;
    }
    if (!wanted || (here & wanted) != wanted) return 0;
    if (i.run) i.run(w, i, wanted);
    else if (wanted == present) w.sync = ++now;
    w.waiting &= ~wanted;
    move(w, wanted, pc + 1);
    return wanted;
}

static u32 lanes_of_guard(const Warp& w, const Instruction& i, u32 active) {
    if (i.guard < 0) return active;
    const u8* p = w.registers + i.guard;
    u32 lanes = 0;
    for (u32 m = active; m; m &= m - 1)
        if ((p[first_of(m)] != 0) != i.negated) lanes |= m & -m;
    return lanes;
}

// Runs lanes that are together at pc, until they part, wait, or reach `limit`, where others may be.
static void run_together(Warp& w, u32 active, u32 pc, u32 limit) {
    const u32 present = w.live & ~w.exited;
    for (;; pc++) {
        if (pc >= limit) return move(w, active, pc);
        const Instruction& i = w.block->kernel->code[pc];
        const u32 lanes = lanes_of_guard(w, i, active);
        i.hits += lanes != 0;
        if (i.skipped) continue;
        switch (i.kind) {
            case PLAIN:
                if (lanes) i.run(w, i, lanes);
                break;
            case BRA:
                if (!lanes) break;
                move(w, lanes, i.target);
                move(w, active & ~lanes, pc + 1);
                // lanes that wait elsewhere may now be the first
                if (lanes != active || limit != ~0u) return;
                pc = i.target - 1;
                break;
            case RET:
                w.exited |= lanes;
                for (u32 m = lanes; m; m &= m - 1)
                    for (auto& group : w.groups[first_of(m)])
                        if (!group.empty()) report("a thread ends before its cp.async", w, i, first_of(m));
                return move(w, active & ~lanes, pc + 1);
            case TRAP:
            case UNKNOWN:
                if (!lanes) break;
                report(i.kind == TRAP ? "trap" : "an instruction that instructions.cpp has not", w, i,
                    first_of(lanes));
                w.block->dead = true;
                return;
            default:  // wait for the others
                move(w, lanes, pc);
                move(w, active & ~lanes, pc + 1);
                w.waiting |= lanes;
                // the usual case: everybody goes on
                if (!lanes || meet(w, pc) != active || active != present) return;
        }
    }
}

static Stop run_warp(Warp& w) {
    while (!w.block->dead) {
        const u32 present = w.live & ~w.exited, runnable = present & ~w.waiting;
        if (!present) return DONE;
        if (!runnable) {
            // lanes that others wait for may have ended since
            u32 met = 0;
            bool only_barriers = true;
            for (u32 m = w.waiting; m && !met; m &= m - 1) {
                const u32 pc = w.pc[first_of(m)];
                only_barriers &= w.block->kernel->code[pc].kind == BARRIER;
                met = meet(w, pc);
            }
            if (met) continue;
            return only_barriers ? AT_BARRIER : STUCK;
        }
        u32 pc = ~0u, limit = ~0u, active = 0;
        for (u32 m = runnable; m; m &= m - 1) pc = std::min(pc, w.pc[first_of(m)]);
        for (u32 m = runnable; m; m &= m - 1) {
            if (w.pc[first_of(m)] == pc) active |= m & -m;
            else limit = std::min(limit, w.pc[first_of(m)]);
        }
        run_together(w, active, pc, limit);
    }
    return STUCK;
}

// ---- a block ----
static void report_deadlock(const Block& b, const Warp& w) {
    std::ostringstream s;
    for (u32 m = w.waiting; m; m &= m - 1)
        s << " lane " << first_of(m) << " waits at " << b.kernel->code[w.pc[first_of(m)]].where;
    const int l = first_of(w.waiting);
    report("deadlock within a warp", w, b.kernel->code[w.pc[l]], l, s.str());
}

// All threads that are left wait at a barrier: let them go on.
static void pass_barrier(Block& b) {
    s64 pc = -1;
    for (Warp& w : b.warps) {
        for (u32 m = w.waiting; m; m &= m - 1) {
            const int l = first_of(m);
            if (pc < 0) pc = w.pc[l];
            const Instruction& i = b.kernel->code[pc];
            if (w.pc[l] != pc)
                report("threads wait at different barriers", w, i, l, b.kernel->code[w.pc[l]].where);
        }
        const Instruction& i = b.kernel->code[std::max<s64>(pc, 0)];
        if (w.waiting && w.exited)
            report("barrier in a warp of which lanes have ended", w, i, first_of(w.exited));
        if (!w.waiting) report("barrier without a warp that has ended", w, i, 0);
        for (u32 m = w.waiting; m; m &= m - 1) w.pc[first_of(m)]++;
        w.waiting = 0;
    }
    b.barrier = ++now;
}

static void run_block(Block& b) {
    const int count = (int)b.warps.size();
    vector<Stop> state(count, AT_BARRIER);
    b.started = b.barrier = ++now;
    for (;;) {
        int done = 0;
        for (int n = 0; n < count; n++) {
            const int at = options.reverse ? count - 1 - n : n;
            if (state[at] != DONE) state[at] = run_warp(b.warps[at]);
            if (b.dead) return;
            if (state[at] == STUCK) return report_deadlock(b, b.warps[at]);
            done += state[at] == DONE;
        }
        if (done == count) return;
        pass_barrier(b);
    }
}

static void start_warp(Warp& w, Block& b, int id, u8* registers, Dim grid, Dim block) {
    const Kernel& k = *b.kernel;
    w.block = &b;
    w.id = id;
    w.registers = registers;
    for (const Constant& c : k.constants)
        for (int l = 0; l < 32; l++) put(w, {c.at, c.width, 0}, l, c.bits);
    for (int l = 0; l < 32; l++) {
        const u32 t = id * 32 + l;
        if (t < block.x * block.y * block.z) w.live |= 1u << l;
        w.pc[l] = 0;
        const std::pair<const u32*, Dim> special[] = {
            {k.tid, {t % block.x, t / block.x % block.y, t / block.x / block.y}},
            {k.ctaid, b.index}, {k.ntid, block}, {k.nctaid, grid}};
        for (auto& [places, value] : special) {
            const u32 axes[] = {value.x, value.y, value.z};
            for (int axis = 0; axis < 3; axis++) put(w, {places[axis], 4, 0}, l, axes[axis]);
        }
        put(w, {k.laneid, 4, 0}, l, l);
    }
}

// ---- a launch ----
static u64 rows = 0;  // not 0: of a batch of so many rows, only the blocks of the last one run

static int refuse(const Kernel& k, const string& why) {
    Finding& f = findings[{&k, why}];
    f = {"launch: " + why, k.name, "", "", "", f.count + 1};
    return 1;  // cudaErrorInvalidValue
}

static int launch(Kernel& k, Dim grid, Dim block, void** arguments, u64 dynamic) {
    if (!k.parsed) parse(k);
    const u32 threads = block.x * block.y * block.z;
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        return refuse(k, "grid");
    if (!threads || threads > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64)
        return refuse(k, "block");
    if (k.maxntid && threads > k.maxntid) return refuse(k, "more threads than __launch_bounds__");
    if (k.static_shared + dynamic > 48 << 10) return refuse(k, "more than 48 KB of shared memory");
    k.launches++;

    Block b;
    b.kernel = &k;
    b.params.resize(k.param_bytes);
    for (size_t n = 0; n < k.param_at.size(); n++)
        memcpy(&b.params[k.param_at[n]], arguments[n], k.param_size[n]);
    auto variables = k.shared;
    if (k.dynamic_at) variables.push_back({k.dynamic_at, (u32)dynamic});
    const u32 shared_size = k.dynamic_at ? k.dynamic_at + dynamic : k.shared_end;
    b.shared.resize(shared_size);
    b.valid.resize(shared_size);
    b.written.resize(shared_size);
    b.read.resize(shared_size);
    for (auto& [at, size] : variables) std::fill_n(b.valid.begin() + at, size, 1);
    const int warps = (threads + 31) / 32;
    vector<u8> registers((size_t)k.register_bytes * warps);
    b.launched = ++now;
    const u64 blocks = (u64)grid.x * grid.y * grid.z;
    for (u64 n = 0; n < blocks; n++) {
        const u64 at = options.reverse ? blocks - 1 - n : n;
        b.index = {(u32)(at % grid.x), (u32)(at / grid.x % grid.y), (u32)(at / grid.x / grid.y)};
        if (rows && (grid.z == rows ? b.index.z < rows - 1 : b.index.x < grid.x - grid.x / rows)) continue;
        // garbage, as on a GPU: NaN in every dtype
        memset(registers.data(), 0xff, registers.size());
        for (auto& [place, size] : variables) memset(b.shared.data() + place, 0xff, size);
        b.warps = vector<Warp>(warps);
        for (int id = 0; id < warps; id++)
            start_warp(b.warps[id], b, id, &registers[(size_t)k.register_bytes * id], grid, block);
        run_block(b);
        if (b.dead) return 719;  // cudaErrorLaunchFailure
    }
    return 0;
}

// ---- the runtime's functions that nvcc's host code calls ----
struct Function { Module* module; string name; std::unique_ptr<Kernel> kernel; };
// functions, because constructors of other files come first
static auto& functions() { static auto* all = new std::map<const void*, Function>; return *all; }
static auto& modules() { static auto* all = new std::deque<Module>; return *all; }

static Kernel& kernel_of(Function& f) {
    if (!f.module->read) read_module(*f.module);
    if (!f.kernel) {
        if (!f.module->entries.count(f.name)) fatal("no kernel " + f.name);
        f.kernel.reset(new Kernel{f.name, f.module});
    }
    return *f.kernel;
}

static int device = 0, last_error = 0;
constexpr int DEVICES = 2;
struct Configuration { Dim grid, block; size_t shared; void* stream; };
static vector<Configuration> configurations;

extern "C" {
void** __cudaRegisterFatBinary(void* wrapper) {
    struct Wrapper { u32 magic, version; const char* data; void* more; };
    modules().push_back({((Wrapper*)wrapper)->data});
    return (void**)&modules().back();
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** module, const char* host, char*, const char* name, int, void*, void*,
    void*, void*, int*) {
    functions()[host] = {(Module*)module, name, nullptr};
}
unsigned __cudaPushCallConfiguration(Dim grid, Dim block, size_t shared, void* stream) {
    configurations.push_back({grid, block, shared, stream});
    return 0;
}
int __cudaPopCallConfiguration(Dim* grid, Dim* block, size_t* shared, void* stream) {
    const Configuration c = configurations.back();
    configurations.pop_back();
    *grid = c.grid, *block = c.block, *shared = c.shared, *(void**)stream = c.stream;
    return 0;
}
int __cudaGetKernel(void** kernel, const void* host) {
    auto it = functions().find(host);
    if (it == functions().end()) fatal("a launch of an unknown kernel");
    *kernel = &it->second;
    return 0;
}
// A stream is (device + 1) << 8, so that one of another device shows. Null is the current device's.
int __cudaLaunchKernel(void* kernel, Dim grid, Dim block, void** arguments, size_t shared, void* stream) {
    Kernel& k = kernel_of(*(Function*)kernel);
    if (stream && (u64)stream != (u64)(device + 1) << 8) last_error = refuse(k, "stream of another device");
    const int error = launch(k, grid, block, arguments, shared);
    if (error) last_error = error;
    return error;
}
int cudaGetDevice(int* d) { return *d = device, 0; }
int cudaSetDevice(int d) { return d < 0 || d >= DEVICES ? 101 : (device = d, 0); }
int cudaGetLastError() { return std::exchange(last_error, 0); }

// ---- for Python ----
void ptx_options(int mma, int approx, int reverse, int traffic) { options = {mma, approx, reverse, traffic}; }
void ptx_last_row_of(u64 batch) { rows = batch; }
void ptx_clear() { findings.clear(); }
// Leaves out an instruction of a kernel that ran, or takes it in again.
void ptx_skip(const char* kernel, int at, int skipped) {
    for (auto& [host, f] : functions())
        if (f.name == kernel && f.kernel) f.kernel->code.at(at).skipped = skipped;
}

static string quoted(const string& s) {
    string q = "\"";
    for (char c : s) {
        if (c == '"' || c == '\\') q += '\\';
        q += c == '\n' || c == '\t' ? ' ' : c;
    }
    return q + "\"";
}
static string numbers(std::initializer_list<u64> values) {
    string joined;
    for (u64 value : values) joined += (joined.empty() ? "" : ",") + std::to_string(value);
    return joined;
}
static const char* listed(const char* brackets, const vector<string>& parts) {
    static string result;
    result = brackets[0];
    for (const string& part : parts) result += (result.size() > 1 ? "," : "") + part;
    return (result += brackets[1]).c_str();
}
// [{kind, kernel, where, instruction, example, count}]
const char* ptx_findings() {
    vector<string> parts;
    for (auto& [key, f] : findings)
        parts.push_back("{\"kind\":" + quoted(f.kind) + ",\"kernel\":" + quoted(f.kernel) + ",\"where\":" +
                        quoted(f.where) + ",\"instruction\":" + quoted(f.instruction) + ",\"example\":" +
                        quoted(f.example) + ",\"count\":" + std::to_string(f.count) + "}");
    return listed("[]", parts);
}
// [[text, line of the source, executions, parts, least]] of a kernel that ran
const char* ptx_code(const char* kernel) {
    vector<string> parts;
    for (auto& [host, f] : functions())
        if (f.name == kernel && f.kernel)
            for (const Instruction& i : f.kernel->code)
                parts.push_back("[" + quoted(i.text) + "," + quoted(i.where) + "," +
                                numbers({i.hits, i.parts, i.least}) + "]");
    return listed("[]", parts);
}
// {kernel: [launches, instructions, those executed]} of the library's kernels
const char* ptx_kernels() {
    vector<string> parts;
    for (auto& [host, f] : functions()) {
        u64 launches = 0, instructions = 0, executed = 0;
        if (f.kernel) {
            launches = f.kernel->launches, instructions = f.kernel->code.size();
            for (const Instruction& i : f.kernel->code) executed += i.hits > 0;
        }
        parts.push_back(quoted(f.name) + ":[" + numbers({launches, instructions, executed}) + "]");
    }
    return listed("{}", parts);
}
}
