// Memory that kernels touch, and the checks of each access: bounds, alignment, contents, races.
//
// Each byte of shared and global memory knows who wrote and who read it last, in a clock that ticks at
// barriers. So a race is found in whatever order warps run.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <sstream>

#include "machine.h"

u64 now = 1;
// A tag is clock << 16 | flags | thread. The flags: lanes, warps or blocks beside that thread did the same.
constexpr u64 THREAD = 1023, LANES = 1 << 10, WARPS = 1 << 11, BLOCKS = 1 << 12;

namespace {

// Zeros, of which only those that are touched take memory: tensors may be larger than this machine.
template <class T> struct Sparse {
    T* at;
    u64 bytes;
    explicit Sparse(u64 count) : bytes(count * sizeof(T)) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        at = (T*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (at == MAP_FAILED) fatal("no memory for the tags of a tensor");
    }
    Sparse(const Sparse&) = delete;
    ~Sparse() { munmap(at, bytes); }
    T& operator[](u64 i) { return at[i]; }
};

}  // namespace

struct Allocation {
    u64 base, size;
    string name;
    bool all_known, readonly;
    Sparse<u8> set;  // 1 for a byte that a kernel has written
    Sparse<Tag> written, read;
    bool known(u64 i) { return all_known || set[i]; }
    bool holds(u64 address, u32 bytes) const { return address >= base && address + bytes <= base + size; }
};
static std::map<u64, std::unique_ptr<Allocation>> allocations;  // by their end
static u64 generation = 1;

static Allocation* find_allocation(u64 address) {
    auto it = allocations.upper_bound(address);
    return it != allocations.end() && it->second->base <= address ? it->second.get() : nullptr;
}
string place_in_allocation(const Instruction& i, u64 address) {
    return std::to_string(address - i.last->base) + " bytes from the start of " + i.last->name;
}

// Who else touched a byte without a barrier in between. `since`: before it was another launch or, for shared
// memory, another block.
static const char* conflict(Tag tag, const Warp& w, int lane, u64 since) {
    const Block& b = *w.block;
    const u64 clock = tag >> 16;
    if (clock < since) return nullptr;
    if (tag & BLOCKS || clock < b.started) return "another block";
    if (clock < b.barrier) return nullptr;
    if (tag & WARPS) return "another warp";
    const u32 thread = tag & THREAD;
    if (!(tag & LANES) && thread == (u32)(w.id * 32 + lane)) return nullptr;
    if (thread / 32 != (u32)w.id) return "another warp";
    return clock < w.sync ? nullptr : "another lane of the warp";
}
static Tag read_tag(Tag old, const Warp& w, int lane, u64 since) {
    const Block& b = *w.block;
    const u64 clock = old >> 16;
    const Tag tag = tag_of(w, lane);
    if (clock < since) return tag;
    if (old & BLOCKS || clock < b.started) return tag | BLOCKS;
    if (clock < b.barrier) return tag;
    if (old & WARPS || (old & THREAD) / 32 != (u64)w.id) return tag | WARPS;
    if (clock < w.sync) return tag;
    return old & LANES || (old & THREAD) != (tag & THREAD) ? tag | LANES : tag;
}

// Looks for races of an access with those before it, and writes its tag. `data`: the bytes that it writes to
// `place`, null for a read.
static void touch(const Warp& w, const Instruction& i, int lane, Tag& written, Tag& read, const u8* data,
    const u8* place, u32 bytes, bool shared, u64 address) {
    const Block& b = *w.block;
    const u64 since = shared ? b.started : b.launched;
    const char* memory = shared ? "shared" : "global";
    auto found = [&](const char* kind, const char* who) {
        std::ostringstream s;
        s << memory << " address 0x" << std::hex << address << ", touched before by " << who;
        report(string(kind) + " in " + memory + " memory", w, i, lane, s.str());
    };
    if (written & ASYNC && written >> 16 >= b.started) return found("access to a cp.async on its way", "it");
    if (const char* who = conflict(written, w, lane, since))
        found(!data ? "race: read after write"
              : !memcmp(data, place, bytes) ? "race: write after write of the same value"
                                             : "race: write after write", who);
    if (data) {
        if (const char* who = conflict(read, w, lane, since)) found("race: write after read", who);
        written = tag_of(w, lane);
    } else {
        read = read_tag(read, w, lane, since);
    }
}

// Neighbouring bytes mostly have the same tags; then what became of the first one's is theirs, too.
struct Alike {
    Tag old_written = ~0ull, old_read = ~0ull, new_written = 0, new_read = 0;
    bool again(Tag& written, Tag& read) const {
        if (written != old_written || read != old_read) return false;
        written = new_written, read = new_read;
        return true;
    }
    void before(Tag written, Tag read) { old_written = written, old_read = read; }
    void after(Tag written, Tag read) { new_written = written, new_read = read; }
};

static string neighbours(u64 address) {
    std::ostringstream s;
    auto it = allocations.upper_bound(address);
    if (it != allocations.end() && it->second->base <= address + 4096)
        s << ", " << (s64)(address - it->second->base) << " bytes from the start of " << it->second->name
          << " (" << it->second->size << ")";
    if (it != allocations.begin())
        s << ", " << (s64)(address - std::prev(it)->first) << " bytes after the end of "
          << std::prev(it)->second->name << " (" << std::prev(it)->second->size << ")";
    return s.str();
}

// Returns where `bytes` at an address of a space are, after all checks; null after a finding. `data`: of a
// write. `used`: a mask of the bytes of a read that are looked at. `known`: for a copy, which may move bytes
// that hold nothing; they are found where they are used.
u8* access(Warp& w, const Instruction& i, int lane, Space space, u64 address, u32 bytes, const u8* data,
    u32 used, u16* known) {
    Block& b = *w.block;
    auto fail = [&](const char* kind) {
        std::ostringstream s;
        s << bytes << " bytes at 0x" << std::hex << address << (space == GLOBAL ? neighbours(address) : "");
        report(kind, w, i, lane, s.str());
        return (u8*)nullptr;
    };
    if (address % bytes) return fail("misaligned access");
    if (space == PARAM) {
        if (data || address + bytes > b.params.size()) return fail("param out of bounds");
        return b.params.data() + address;
    }
    Alike run;
    if (space == SHARED) {
        if (address + bytes > b.valid.size()) return fail("shared memory out of bounds");
        // the gaps between variables are wider than an access
        if (!b.valid[address] || !b.valid[address + bytes - 1]) return fail("shared memory out of bounds");
        for (u32 k = 0; k < bytes; k++) {
            if (!data && !(used >> k & 1)) continue;
            Tag &written = b.written[address + k], &read = b.read[address + k];
            if (run.again(written, read)) continue;
            if (!data && written >> 16 < b.started) return fail("read of uninitialised shared memory");
            run.before(written, read);
            touch(w, i, lane, written, read, data, &b.shared[address], bytes, true, address + k);
            run.after(written, read);
        }
        return &b.shared[address];
    }
    if (allocations.empty()) {  // nobody registers memory: it is not checked
        if (known) *known = 0xffff;
        return (u8*)address;
    }
    Allocation* a = i.generation == generation ? i.last : nullptr;
    i.generation = generation;
    if (!a || !a->holds(address, bytes)) {
        a = i.last = find_allocation(address);
        if (!a || !a->holds(address, bytes)) return fail("global memory out of bounds");
    }
    if (data && a->readonly) return fail("write to an input");
    const u64 at = address - a->base;
    for (u32 k = 0; k < bytes; k++) {
        if (data) a->set[at + k] = 1;
        else if (!(used >> k & 1)) continue;
        else if (known) *known |= (u16)(a->known(at + k) << k);
        else if (!a->known(at + k)) return fail("read of uninitialised global memory");
        Tag &written = a->written[at + k], &read = a->read[at + k];
        if (run.again(written, read)) continue;
        run.before(written, read);
        touch(w, i, lane, written, read, data, (u8*)address, bytes, false, address + k);
        run.after(written, read);
    }
    return (u8*)address;
}

// Counts what an access of a warp costs, and the least that it could. Of shared memory: passes in which each
// of 32 banks gives one word, at least one for every 128 bytes of lanes. Of global memory: sectors of 32
// bytes.
void count_traffic(const Warp& w, const Instruction& i, const Operand& base, u32 lanes, u32 bytes,
    Space space) {
    if (space == PARAM) return;
    u64 at[32];
    each(lanes, [&](int l) { at[l] = address_of(w, base, l); });
    if (space == GLOBAL) {
        auto different = [&](u64 unit) {
            vector<u64> of;
            for (u32 m = lanes; m; m &= m - 1) of.push_back(at[first_of(m)] / unit);
            std::sort(of.begin(), of.end());
            return (u64)(std::unique(of.begin(), of.end()) - of.begin());
        };
        i.parts += different(32);
        i.least += (different(1) * bytes + 31) / 32;
        return;
    }
    const int together = bytes <= 4 ? 32 : 128 / bytes;
    for (int first = 0; first < 32; first += together) {
        vector<u64> of_bank[32];
        size_t most = 0;
        for (int l = first; l < first + together; l++) {
            if (!(lanes >> l & 1)) continue;
            for (u64 word = at[l] / 4; word <= (at[l] + bytes - 1) / 4; word++) {
                auto& seen = of_bank[word % 32];
                if (std::find(seen.begin(), seen.end(), word) == seen.end()) seen.push_back(word);
                most = std::max(most, seen.size());
            }
        }
        i.parts += most;
        i.least += most > 0;
    }
}

extern "C" {
void ptx_register(u64 base, u64 size, const char* name, int known, int readonly) {
    generation++;
    allocations[base + size].reset(new Allocation{base, size, name, (bool)known, (bool)readonly,
        Sparse<u8>(size), Sparse<Tag>(size), Sparse<Tag>(size)});
}
void ptx_unregister(u64 base, u64 size) { generation++, allocations.erase(base + size); }
void ptx_forget_memory() { generation++, allocations.clear(); }
}
