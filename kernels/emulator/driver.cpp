// libcuda.so.1, as far as spikeprobe calls it. A test double: everything runs on the CPU, and the device says so.
//
// Work is put off as long as the real driver might put it off: kernels and asynchronous copies wait in their stream
// until something synchronises, and streams are drained one by one, so that a missing wait between streams, a staging
// buffer used again too early or an argument that dies before the kernel runs shows. Environment, for tests:
//   SPIKEPROBE_EMULATOR_DEVICES=N        devices found (default 1)
//   SPIKEPROBE_EMULATOR_DRIVER=12000     version the driver reports
//   SPIKEPROBE_EMULATOR_CAPABILITY=75    compute capability
//   SPIKEPROBE_EMULATOR_MEMORY=BYTES     device memory (default 8 GiB)
//   SPIKEPROBE_EMULATOR_STRICT=1         a leak at exit makes the exit code 86
//   SPIKEPROBE_EMULATOR_SCHEDULE=…       see blocks.cpp
//   SPIKEPROBE_EMULATOR_COPIES=1         says at exit how many large copies to the device ran while work that was queued
//                                        before them still waited in another stream: those a GPU can overlap
#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <set>

#include "emulator.h"

using emulator::fail;

enum Result {
    success = 0,
    invalid_value = 1,
    out_of_memory = 2,
    no_device = 100,
    invalid_device = 101,
    invalid_image = 200,
    invalid_context = 201,
    not_found = 500,
    launch_failed = 719,
};

struct Function {
    const emulator::Kernel* kernel;
};
struct Module {
    std::vector<std::unique_ptr<Function>> functions;
};
struct Work {
    uint64_t number;  // in the order of queueing, over all streams
    std::function<Result()> run;
};
struct Stream {
    std::deque<Work> waiting;
    uint64_t enqueued = 0, done = 0;
};
struct Event {
    Stream* stream = nullptr;
    uint64_t ticket = 0;
};

static std::recursive_mutex lock;
static std::set<Stream*> streams;
static Stream null_stream;
static Result sticky = success;  // after a failed launch the context is lost, as on a GPU
static int contexts = 0;

static long setting(const char* name, long fallback) {
    const char* text = std::getenv(name);
    return text ? std::atol(text) : fallback;
}

static uint64_t queued = 0;

static Result drain(Stream* stream, uint64_t until) {
    while (stream->done < until && !stream->waiting.empty() && sticky == success) {
        auto next = std::move(stream->waiting.front());
        stream->waiting.pop_front();
        stream->done += 1;
        Result result = next.run();
        if (result != success) sticky = result;
    }
    return sticky;
}
static Result drain_all() {
    drain(&null_stream, null_stream.enqueued);
    for (Stream* stream : streams) drain(stream, stream->enqueued);
    return sticky;
}
static Result enqueue(Stream* stream, std::function<Result()> work) {
    if (!stream) stream = &null_stream;
    stream->waiting.push_back({queued++, std::move(work)});
    stream->enqueued += 1;
    // Bounded, so that a long replay does not pile up its history.
    if (stream->waiting.size() > 512) drain(stream, stream->enqueued - 256);
    return sticky;
}

// One number of a PTX parameter: ".param .u64 x" or ".param .align 8 .b8 x[24]".
static size_t size_of_parameter(const std::string& text) {
    size_t bracket = text.find('[');
    if (bracket != std::string::npos) return std::strtoull(text.c_str() + bracket + 1, nullptr, 10);
    return text.find("64") < text.find(" ", text.find("64")) && text.find("64 ") != std::string::npos ? 8 : 4;
}

// Every entry of the PTX text must be a kernel compiled here with parameters of the same sizes: the emulator runs the
// sources, and this is what ties them to the committed PTX.
static Result read_module(const std::string& ptx, Module& module, std::vector<std::string>& names) {
    const std::string mark = ".entry ";
    for (size_t at = ptx.find(mark); at != std::string::npos; at = ptx.find(mark, at + 1)) {
        size_t open = ptx.find('(', at), close = ptx.find(')', open);
        std::string name = ptx.substr(at + mark.size(), open - at - mark.size());
        const emulator::Kernel* kernel = emulator::find_kernel(name);
        if (!kernel) {
            fprintf(stderr, "cuda emulator: the PTX has a kernel %s that kernels/*.cu does not have\n", name.c_str());
            return invalid_image;
        }
        std::vector<size_t> sizes;
        for (size_t p = ptx.find(".param", open); p < close; p = ptx.find(".param", p + 1)) {
            size_t end = ptx.find_first_of(",)", p);
            sizes.push_back(size_of_parameter(ptx.substr(p, end - p)));
        }
        if (sizes != kernel->sizes) {
            fprintf(stderr, "cuda emulator: the parameters of %s differ between PTX and source: run scripts/build-kernels\n", name.c_str());
            return invalid_image;
        }
        module.functions.push_back(std::make_unique<Function>(Function{kernel}));
        names.push_back(name);
    }
    return module.functions.empty() ? invalid_image : success;
}

static struct AtExit {
    ~AtExit() { emulator::report_leaks(); }
} at_exit;

#define API extern "C" __attribute__((visibility("default")))
#define GUARD std::lock_guard<std::recursive_mutex> guard(lock)

// For libcublas.so.12 of the same folder.
API int emulator_enqueue(void* stream, void (*work)(void*), void* argument, void (*drop)(void*)) {
    GUARD;
    return enqueue(static_cast<Stream*>(stream), [=] {
        work(argument);
        drop(argument);
        return success;
    });
}
API bool emulator_covers(const void* address, size_t bytes) {
    GUARD;
    return emulator::covers(address, bytes);
}

API int cuInit(unsigned) { return setting("SPIKEPROBE_EMULATOR_DEVICES", 1) > 0 ? success : no_device; }
API int cuDriverGetVersion(int* version) {
    *version = (int)setting("SPIKEPROBE_EMULATOR_DRIVER", 12000);
    return success;
}
API int cuDeviceGetCount(int* count) {
    *count = (int)setting("SPIKEPROBE_EMULATOR_DEVICES", 1);
    return success;
}
API int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return ordinal >= 0 && ordinal < setting("SPIKEPROBE_EMULATOR_DEVICES", 1) ? success : invalid_device;
}
API int cuDeviceGetName(char* name, int length, int) {
    snprintf(name, length, "spikeprobe emulator (runs on the CPU, for tests)");
    return success;
}
API int cuDeviceGetAttribute(int* value, int attribute, int) {
    long capability = setting("SPIKEPROBE_EMULATOR_CAPABILITY", 75);
    if (attribute == 75) *value = (int)(capability / 10);       // COMPUTE_CAPABILITY_MAJOR
    else if (attribute == 76) *value = (int)(capability % 10);  // COMPUTE_CAPABILITY_MINOR
    else if (attribute == 16) *value = 4;                       // MULTIPROCESSOR_COUNT
    else return invalid_value;
    return success;
}
API int cuDevicePrimaryCtxRetain(void** context, int) {
    GUARD;
    contexts += 1;
    *context = &contexts;
    return success;
}
API int cuDevicePrimaryCtxRelease_v2(int) {
    GUARD;
    if (contexts == 0) return invalid_context;
    drain_all();
    contexts -= 1;
    return success;
}
API int cuCtxSetCurrent(void*) { return success; }
API int cuCtxSynchronize() {
    GUARD;
    return drain_all();
}

API int cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    GUARD;
    *total = emulator::total_memory();
    *free_bytes = *total - emulator::used_memory();
    return sticky;
}
API int cuMemAlloc_v2(void** address, size_t bytes) {
    GUARD;
    if (bytes == 0) return invalid_value;
    *address = emulator::allocate(bytes);
    return *address ? sticky : out_of_memory;
}
API int cuMemFree_v2(void* address) {
    GUARD;
    drain_all();  // the real one waits for the device too
    return emulator::release(address) ? sticky : invalid_value;
}
API int cuMemHostAlloc(void** address, size_t bytes, unsigned) {
    *address = malloc(bytes);
    return *address ? success : out_of_memory;
}
API int cuMemFreeHost(void* address) {
    GUARD;
    drain_all();
    free(address);
    return success;
}

static Result copy(void* to, const void* from, size_t bytes, const void* on_device) {
    if (!emulator::covers(on_device, bytes)) fail("a copy of " + std::to_string(bytes) + " bytes leaves its allocation");
    memcpy(to, from, bytes);
    return success;
}
// Copies of at least 16 KiB to the device, and those of them that overtook earlier work of other streams.
static struct Copies {
    size_t large = 0, ahead = 0;
    ~Copies() {
        if (std::getenv("SPIKEPROBE_EMULATOR_COPIES"))
            fprintf(stderr, "cuda emulator: %zu of %zu large copies ran ahead of queued kernels\n", ahead, large);
    }
} copies;

API int cuMemcpyHtoDAsync_v2(void* to, const void* from, size_t bytes, void* stream) {
    GUARD;
    auto own = static_cast<Stream*>(stream);
    uint64_t number = queued;
    return enqueue(own, [=] {
        if (bytes >= 16 << 10) {
            auto older = [=](Stream* other) { return other != own && !other->waiting.empty() && other->waiting.front().number < number; };
            copies.large += 1;
            copies.ahead += std::any_of(streams.begin(), streams.end(), older);
        }
        return copy(to, from, bytes, to);
    });
}
API int cuMemcpyDtoHAsync_v2(void* to, const void* from, size_t bytes, void* stream) {
    GUARD;
    return enqueue(static_cast<Stream*>(stream), [=] { return copy(to, from, bytes, from); });
}
API int cuMemcpyDtoDAsync_v2(void* to, const void* from, size_t bytes, void* stream) {
    GUARD;
    return enqueue(static_cast<Stream*>(stream), [=] {
        if (!emulator::covers(from, bytes)) fail("a copy reads past its allocation");
        return copy(to, from, bytes, to);
    });
}
API int cuMemsetD8Async(void* to, unsigned char value, size_t bytes, void* stream) {
    GUARD;
    return enqueue(static_cast<Stream*>(stream), [=] {
        if (!emulator::covers(to, bytes)) fail("a fill leaves its allocation");
        memset(to, value, bytes);
        return success;
    });
}

API int cuStreamCreate(void** stream, unsigned) {
    GUARD;
    auto made = new Stream;
    streams.insert(made);
    *stream = made;
    return success;
}
API int cuStreamDestroy_v2(void* stream) {
    GUARD;
    auto s = static_cast<Stream*>(stream);
    Result result = drain(s, s->enqueued);
    streams.erase(s);
    delete s;
    return result;
}
API int cuStreamSynchronize(void* stream) {
    GUARD;
    auto s = stream ? static_cast<Stream*>(stream) : &null_stream;
    return drain(s, s->enqueued);
}
API int cuStreamWaitEvent(void* stream, void* event, unsigned) {
    GUARD;
    Event at = *static_cast<Event*>(event);
    if (!at.stream) return success;
    return enqueue(static_cast<Stream*>(stream), [at] { return streams.count(at.stream) ? drain(at.stream, at.ticket) : success; });
}
API int cuEventCreate(void** event, unsigned) {
    *event = new Event;
    return success;
}
API int cuEventRecord(void* event, void* stream) {
    GUARD;
    auto s = stream ? static_cast<Stream*>(stream) : &null_stream;
    *static_cast<Event*>(event) = {s, s->enqueued};
    return success;
}
API int cuEventSynchronize(void* event) {
    GUARD;
    auto e = static_cast<Event*>(event);
    return e->stream && streams.count(e->stream) ? drain(e->stream, e->ticket) : success;
}
API int cuEventDestroy_v2(void* event) {
    delete static_cast<Event*>(event);
    return success;
}

API int cuModuleLoadData(void** module, const void* image) {
    GUARD;
    auto made = std::make_unique<Module>();
    std::vector<std::string> names;
    Result result = read_module(static_cast<const char*>(image), *made, names);
    if (result == success) *module = made.release();
    return result;
}
API int cuModuleUnload(void* module) {
    delete static_cast<Module*>(module);
    return success;
}
API int cuModuleGetFunction(void** function, void* module, const char* name) {
    GUARD;
    for (auto& f : static_cast<Module*>(module)->functions) {
        if (!strcmp(f->kernel->name, name)) {
            *function = f.get();
            return success;
        }
    }
    return not_found;
}
API int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                       unsigned shared, void* stream, void** parameters, void**) {
    GUARD;
    const emulator::Kernel* kernel = static_cast<Function*>(function)->kernel;
    bool fits = gx > 0 && gy > 0 && gz > 0 && gy <= 65535 && gz <= 65535 && gx <= 0x7FFFFFFFu && (size_t)bx * by * bz <= 1024 &&
                bx > 0 && by > 0 && bz > 0 && shared == 0;
    if (!fits) return invalid_value;
    // The driver copies the arguments before it returns.
    auto values = std::make_shared<std::vector<std::vector<char>>>();
    for (size_t i = 0; i < kernel->sizes.size(); i++) {
        auto from = static_cast<const char*>(parameters[i]);
        values->emplace_back(from, from + kernel->sizes[i]);
    }
    return enqueue(static_cast<Stream*>(stream), [=]() -> Result {
        std::vector<void*> arguments;
        for (auto& value : *values) arguments.push_back(value.data());
        std::string error = emulator::run_grid(*kernel, {gx, gy, gz}, {bx, by, bz}, arguments.data());
        if (error.empty()) return success;
        fprintf(stderr, "cuda emulator: %s\n", error.c_str());
        return launch_failed;
    });
}

API int cuGetErrorName(int error, const char** text) {
    switch (error) {
        case success: *text = "CUDA_SUCCESS"; break;
        case invalid_value: *text = "CUDA_ERROR_INVALID_VALUE"; break;
        case out_of_memory: *text = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case no_device: *text = "CUDA_ERROR_NO_DEVICE"; break;
        case invalid_device: *text = "CUDA_ERROR_INVALID_DEVICE"; break;
        case invalid_image: *text = "CUDA_ERROR_INVALID_IMAGE"; break;
        case not_found: *text = "CUDA_ERROR_NOT_FOUND"; break;
        case launch_failed: *text = "CUDA_ERROR_LAUNCH_FAILED"; break;
        default: *text = "CUDA_ERROR_UNKNOWN"; break;
    }
    return success;
}
API int cuGetErrorString(int error, const char** text) { return cuGetErrorName(error, text); }
