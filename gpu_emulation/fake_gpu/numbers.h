// What the stub (fake_cuda.cpp) and its memory (numbers.cpp) ask each other for.
#pragma once
#include <c10/core/Allocator.h>

c10::Device current_device();
void set_current_device(c10::DeviceIndex index);
bool is_pinned_memory(const void* data);
c10::Allocator* pinned_memory_allocator();
void wait_for_copies();
