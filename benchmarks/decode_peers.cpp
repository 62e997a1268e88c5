// What benchmarks/decode.py measures beside the decoder: the read bandwidth, and with LLAMA defined llama.cpp through its C interface.
#include "../cuda/cpu.h"

extern "C" float read_bytes(const void* data, int64_t bytes, int64_t threads) {
    const long lines = bytes / 64;
    std::vector<float> sums(threads * 16);
    parallel(threads, threads, [&](long part, int) {
        typedef Lanes<16>::F Line;
        const Line* p = static_cast<const Line*>(data);
        Line total[8] = {};
        for (long i = lines * part / threads; i + 8 <= lines * (part + 1) / threads; i += 8)
            for (int l = 0; l < 8; l++) total[l] += p[i + l];
        for (int l = 1; l < 8; l++) total[0] += total[l];
        sums[16 * part] = total[0][0];
    });
    return sums[0];
}

#ifdef LLAMA
#include "llama.h"

extern "C" {

void* llama_start(const char* folder, const char* file, int64_t tokens) {
    llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
    ggml_backend_load_all_from_path(folder);
    llama_model* model = llama_model_load_from_file(file, llama_model_default_params());
    if (!model) return nullptr;
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = static_cast<uint32_t>(tokens);
    return llama_init_from_model(model, params);
}

// logits after the last of `count` tokens
int llama_feed(void* handle, const int32_t* tokens, int64_t count, int64_t threads, float* logits) {
    llama_context* context = static_cast<llama_context*>(handle);
    llama_set_n_threads(context, static_cast<int>(threads), static_cast<int>(threads));
    if (llama_decode(context, llama_batch_get_one(const_cast<int32_t*>(tokens), static_cast<int>(count)))) return 1;
    const int size = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(context)));
    memcpy(logits, llama_get_logits_ith(context, -1), sizeof(float) * size);
    return 0;
}

void llama_forget(void* handle) { llama_memory_clear(llama_get_memory(static_cast<llama_context*>(handle)), true); }

}
#endif
