// Kernels from the PTX in a library's fat binary.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <unordered_map>

#include "machine.h"

void fatal(const string& message) {
    fprintf(stderr, "ptx: %s\n", message.c_str());
    exit(3);
}

static string trim(const string& s) {
    const char* blank = " \t\r\n";
    const size_t from = s.find_first_not_of(blank);
    return from == string::npos ? "" : s.substr(from, s.find_last_not_of(blank) - from + 1);
}
static vector<string> split(const string& s, char by) {  // outside of braces and brackets, trimmed
    vector<string> parts;
    int depth = 0;
    string part;
    for (char c : s) {
        depth += (c == '{' || c == '[') - (c == '}' || c == ']');
        if (c == by && !depth) parts.push_back(trim(part)), part.clear();
        else part += c;
    }
    parts.push_back(trim(part));
    return parts;
}
static bool starts(const string& s, const char* with) { return s.compare(0, strlen(with), with) == 0; }
static u32 up(u32 x, u32 multiple) { return (x + multiple - 1) / multiple * multiple; }
static u32 type_size(const string& type) {  // of "f32"
    if (type == "pred") return 1;
    const size_t digits = type.find_first_of("0123456789");
    return digits == string::npos ? 0 : atoi(type.c_str() + digits) / 8;
}

// .param .align 8 .b8 name[16], .shared .align 16 .b8 name[], .param .u64 name
struct Declaration {
    string name, type, inside;  // inside brackets: a number and ], or only ]
    u32 align = 0;
    explicit Declaration(const string& text) {
        std::istringstream in(text);
        string word;
        while (in >> word) {
            if (word == ".align") in >> align;
            else if (word[0] != '.') name = word;
            else if (type_size(word.substr(1))) type = word.substr(1);
        }
        if (const size_t bracket = name.find('['); bracket != string::npos)
            inside = name.substr(bracket + 1), name.resize(bracket);
    }
    u32 size() const { return type_size(type) * (inside.empty() ? 1 : atoi(inside.c_str())); }
};

struct Parser {
    Kernel& k;
    std::unordered_map<string, Operand> registers;
    std::unordered_map<string, u64> symbols;
    std::unordered_map<string, int> labels;
    std::map<std::pair<u64, u8>, u32> constants;
    vector<std::pair<int, string>> branches;
    u32 next = 0;
    string where;
    u16 used = 0xffff;

    u32 reserve(u32 width) {
        const u32 at = next;
        next += 32 * std::max(width, 1u);
        return at;
    }
    Operand constant(u64 bits, u8 width) {
        auto [it, fresh] = constants.try_emplace({bits, width}, 0);
        if (fresh) k.constants.push_back({it->second = reserve(width), width, bits});
        return {it->second, width, 0};
    }
    // a register, a special register, a number or a symbol; `width` of numbers
    Operand operand(const string& s, u8 width) {
        if (s == "_") return {reserve(8), 0, 0};
        if (auto it = registers.find(s); it != registers.end()) return it->second;
        if (auto it = symbols.find(s); it != symbols.end()) return constant(it->second, width);
        if (starts(s, "0f")) return constant(strtoull(s.c_str() + 2, nullptr, 16), 4);
        if (isdigit(s[0]) || s[0] == '-') {
            const bool negative = s[0] == '-';
            const u64 bits = negative ? strtoll(s.c_str(), nullptr, 0) : strtoull(s.c_str(), nullptr, 0);
            return constant(width >= 8 ? bits : bits & ((1ull << 8 * width) - 1), width);
        }
        fatal("unknown operand " + s);
    }
    void special_registers() {
        for (auto& [name, places] : {std::pair<const char*, u32*>{"%tid.", k.tid}, {"%ctaid.", k.ctaid},
                 {"%ntid.", k.ntid}, {"%nctaid.", k.nctaid}})
            for (int axis = 0; axis < 3; axis++)
                registers[string(name) + "xyz"[axis]] = {places[axis] = reserve(4), 4, 0};
        registers["%laneid"] = {k.laneid = reserve(4), 4, 0};
    }

    void declare_registers(const string& statement) {  // .reg .b32 %r<10>
        std::istringstream in(statement);
        string reg, type, name;
        in >> reg >> type >> name;
        const u8 width = (u8)type_size(type.substr(1));
        const size_t open = name.find('<');
        if (open == string::npos) registers[name] = {reserve(width), width, 0};
        else
            for (int n = 0; n < atoi(name.c_str() + open + 1); n++)
                registers[name.substr(0, open) + std::to_string(n)] = {reserve(width), width, 0};
    }
    // with guard bytes around, which the real layout has not
    void declare_shared(const string& statement) {
        const Declaration d(statement);
        if (d.inside.empty()) fatal("shared variable " + statement);
        if (symbols.count(d.name)) return;
        const u32 align = std::max(d.align, 1u);
        if (d.inside == "]") {  // dynamic: behind all others
            symbols[d.name] = k.dynamic_at = (64 << 10) + align;
            return;
        }
        k.shared_end = up(k.shared_end + 64, align);
        if (k.shared_end / align % 2 == 0) k.shared_end += align;  // aligned to no more than that
        symbols[d.name] = k.shared_end;
        k.shared.push_back({k.shared_end, d.size()});
        k.shared_end += d.size();
        k.static_shared = up(k.static_shared, align) + d.size();
    }
    void declare_params(const string& text) {
        for (const string& parameter : split(text, ',')) {
            const Declaration d(parameter);
            if (d.name.empty()) continue;
            k.param_bytes = up(k.param_bytes, d.align && !d.inside.empty() ? d.align : type_size(d.type));
            symbols[d.name] = k.param_bytes;
            k.param_at.push_back(k.param_bytes);
            k.param_size.push_back(d.size());
            k.param_bytes += d.size();
        }
    }

    // {a, b}, [base+offset], d|p or a single one
    void add(Instruction& i, const string& s, u8 width) {
        if (s[0] == '{') {
            for (const string& part : split(s.substr(1, s.size() - 2), ',')) add(i, part, width);
        } else if (s[0] == '[') {
            const string inner = s.substr(1, s.size() - 2);
            const size_t plus = inner.find('+');
            Operand& o = i.o[i.operands++] = operand(trim(inner.substr(0, plus)), width);
            if (plus != string::npos) o.offset = strtoll(inner.c_str() + plus + 1, nullptr, 0);
        } else if (const size_t bar = s.find('|'); bar != string::npos) {
            add(i, s.substr(0, bar), width);
            add(i, s.substr(bar + 1), 1);
        } else {
            Operand& o = i.o[i.operands++] = operand(s, width);
            if (o.width && o.width != width) fatal("width of an operand: " + i.text);
        }
    }

    void instruction(string s) {
        Instruction i;
        i.text = s;
        i.where = where;
        if (s[0] == '@') {
            const size_t blank = s.find_first_of(" \t");
            const string p = s.substr(1, blank - 1);
            i.negated = p[0] == '!';
            i.guard = operand(p.substr(i.negated), 1).at;
            s = trim(s.substr(blank));
        }
        const size_t blank = s.find_first_of(" \t");
        const string op = s.substr(0, blank), rest = blank == string::npos ? "" : trim(s.substr(blank));
        const vector<string> parts = split(op, '.');
        vector<string> a;
        if (!rest.empty()) a = split(rest, ',');
        if (parts[0] == "bra") {
            i.kind = BRA;
            branches.push_back({(int)k.code.size(), a[0]});
        } else if (parts[0] == "ld" || parts[0] == "st") {
            load_or_store(i, parts, a);
        } else if (parts[0] == "mov" && op != "mov.pred") {
            const u8 width = (u8)type_size(parts[1]);
            const bool from_vector = a[1][0] == '{', to_vector = a[0][0] == '{';
            i.run = to_vector ? unpack : from_vector ? pack : mov;
            add(i, a[0], to_vector ? width / 2 : width);
            add(i, a[1], from_vector ? width / 2 : width);
        } else {
            const Entry* entry = find_instruction(op);
            if (!entry || a.size() > entry->width.size() || (entry->kind == BARRIER && rest != "0")) {
                i.kind = UNKNOWN;
                a.clear();
            } else {
                i.run = entry->run;
                i.kind = entry->kind;
            }
            if (op == "mov.pred" && a[1][0] == '-') a[1] = "1";
            for (size_t n = 0; n < a.size(); n++) add(i, a[n], entry->width[n]);
        }
        k.code.push_back(i);
    }
    void load_or_store(Instruction& i, const vector<string>& parts, const vector<string>& a) {
        const bool load = parts[0] == "ld";
        auto has = [&](const char* part) { return std::count(parts.begin(), parts.end(), part) > 0; };
        for (size_t n = 1; n < parts.size(); n++) {
            const string& part = parts[n];
            if (part != "param" && part != "shared" && part != "global" && part != "cs" && part != "v2" &&
                part != "v4" && !type_size(part))
                i.kind = UNKNOWN;
        }
        i.run = load ? ld : st;
        i.space = has("param") ? PARAM : has("shared") ? SHARED : GLOBAL;
        if (i.space == GLOBAL && !has("global")) i.kind = UNKNOWN;  // a generic address
        i.vector = has("v4") ? 4 : has("v2") ? 2 : 1;
        i.size = (u8)type_size(parts.back());
        i.is_signed = parts.back()[0] == 's';
        if (load) i.used = used, used = 0xffff;
        const u8 width = i.space == SHARED ? 4 : 8;
        for (const string& s : a) {
            if (s[0] == '[') { add(i, s, width); continue; }
            // a register may be wider than what is loaded or stored
            for (const string& part : split(s[0] == '{' ? s.substr(1, s.size() - 2) : s, ','))
                i.o[i.operands++] = operand(part, i.size);
        }
        if (i.operands != 1 + i.vector) fatal("operands of " + i.text);
    }

    // .loc file row column, function_name ..., inlined_at file row column
    void location(const string& line) {
        int file, row, at_file = 0, at_row = 0;
        sscanf(line.c_str(), ".loc %d %d", &file, &row);
        if (const size_t p = line.find("inlined_at"); p != string::npos)
            sscanf(line.c_str() + p, "inlined_at %d %d", &at_file, &at_row);
        auto name = [&](int file) {
            auto it = k.module->files.find(file);
            return it == k.module->files.end() ? string("?") : it->second;
        };
        where = name(file) + ":" + std::to_string(row);
        if (at_file) where += " in " + name(at_file) + ":" + std::to_string(at_row);
    }
    void statement(const string& s) {
        if (starts(s, ".reg")) declare_registers(s);
        else if (starts(s, ".shared")) declare_shared(s);
        else if (starts(s, ".pragma")) {
            if (const size_t p = s.find("used_bytes_mask"); p != string::npos)
                used = (u16)strtoul(s.c_str() + p + 15, nullptr, 0);
        } else if (s[0] == '.') fatal("unknown directive: " + s);
        else instruction(s);
    }
    void body(const string& text) {  // statements end with ;, but .loc with its line
        string so_far, line;
        std::istringstream lines(text);
        while (std::getline(lines, line)) {
            line = trim(line.substr(0, line.find("//")));
            if (starts(line, ".loc")) {
                location(line);
                continue;
            }
            for (char c : line) {
                const string s = strchr("{}:;", c) ? trim(so_far) : "";
                if ((c == '{' || c == '}') && s.empty()) continue;  // a scope
                if (c == ':' && s[0] == '$') labels[s] = (int)k.code.size();
                else if (c == ';') statement(s);
                else {
                    so_far += c;
                    continue;
                }
                so_far.clear();
            }
            so_far += ' ';
        }
    }

    void parse() {
        const string& text = k.module->entries.at(k.name);
        const size_t open = text.find('('), close = text.find("\n)", open), start = text.find("\n{", close);
        k.shared_end = 1024;
        special_registers();
        declare_params(text.substr(open + 1, close - open - 1));
        const string directives = text.substr(close, start - close);
        if (const size_t p = directives.find(".maxntid"); p != string::npos) {
            u32 x = 1, y = 1, z = 1;
            sscanf(directives.c_str() + p, ".maxntid %u, %u, %u", &x, &y, &z);
            k.maxntid = x * y * z;
        }
        for (auto& [name, declaration] : k.module->shared)
            if (text.find(name, start) != string::npos) declare_shared(declaration);
        body(text.substr(start + 2));
        for (auto& [at, label] : branches) {
            auto it = labels.find(label);
            if (it == labels.end()) fatal("no label " + label);
            k.code[at].target = it->second;
        }
        if (k.dynamic_at && k.shared_end + 64 > k.dynamic_at) fatal("static shared memory of " + k.name);
        k.register_bytes = next;
        k.parsed = true;
    }
};
void parse(Kernel& k) { Parser{k}.parse(); }

// A fat binary has 16 bytes of header, then parts with headers of their own; a part of kind 1 is PTX.
void read_module(Module& m) {
    struct Header { u32 magic; u16 version, header; u64 size; };
    struct Part { u16 kind, version; u32 header; u64 size; };
    m.read = true;
    const Header* h = (const Header*)m.fat_binary;
    if (h->magic != 0xba55ed50) fatal("this is no fat binary");
    const char *at = m.fat_binary + h->header, *end = at + h->size;
    while (at < end) {
        const Part* part = (const Part*)at;
        if (part->kind == 1) m.text = string(at + part->header, strnlen(at + part->header, part->size));
        at += part->header + part->size;
    }
    if (m.text.find(".version") == string::npos)
        fatal("no plain PTX in the fat binary; build with -no-compress");
    std::istringstream lines(m.text);
    string line, entry, name;
    while (std::getline(lines, line)) {
        int number;
        char path[4096];
        if (sscanf(line.c_str(), " .file %d \"%4095[^\"]\"", &number, path) == 2) {
            const char* slash = strrchr(path, '/');
            m.files[number] = slash ? slash + 1 : path;
        }
        if (entry.empty()) {
            if (starts(line, ".shared") || starts(line, ".extern .shared")) {
                const size_t from = line.find(".shared");
                const string declaration = line.substr(from, line.find(';') - from);
                m.shared[Declaration(declaration).name] = declaration;
            }
            const size_t p = line.find(".entry ");
            if (p == string::npos) continue;
            name = line.substr(p + 7, line.find('(') - p - 7);
        }
        entry += line + "\n";
        if (line == "}") m.entries[name] = std::move(entry), entry.clear();
    }
}
