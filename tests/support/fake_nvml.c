/* A libnvidia-ml.so.1 for tests: the functions of nvml.h that longhaul calls, with the same ABI. It answers from the text file
   $FAKE_NVML, one `<gpu> <fact> <value>` per line. A fact that is not in the file is "Not Supported" (3). The facts `init` and
   `count` of GPU 0 are the return codes of nvmlInit and of nvmlDeviceGetCount. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned int uint;
typedef unsigned long long ull;
typedef struct { char legacy[16]; uint domain, bus, device, pci_id, subsystem; char bus_id[32]; } pci_info;
typedef struct { uint pid; ull memory; uint gpu_instance, compute_instance; } process_info;

static int text(size_t gpu, const char *fact, char *value) {
    FILE *file = fopen(getenv("FAKE_NVML"), "r");
    char name[64];
    size_t index;
    int found = 3;
    while (file && fscanf(file, "%zu %63s %255[^\n]", &index, name, value) == 3)
        if (index == gpu && !strcmp(name, fact)) { found = 0; break; }
    if (file) fclose(file);
    return found;
}

static int number(void *gpu, const char *fact, ull *out) {
    char value[256];
    int code = text((size_t)gpu - 1, fact, value);
    if (!code) *out = strtoull(value, NULL, 0);
    return code;
}

static int uint_of(void *gpu, const char *fact, uint *out) {
    ull value = 0;
    int code = number(gpu, fact, &value);
    if (!code) *out = (uint)value;
    return code;
}

static int indexed(void *gpu, const char *fact, uint index, ull *out) {
    char name[64];
    snprintf(name, sizeof name, "%s%u", fact, index);
    return number(gpu, name, out);
}

static int copy(size_t gpu, const char *fact, char *out, uint length) {
    char value[256];
    int code = text(gpu, fact, value);
    if (!code) snprintf(out, length, "%s", value);
    return code;
}

int nvmlInitWithFlags(uint flags) { ull code = 0; (void)flags; number((void *)1, "init", &code); return (int)code; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(uint *out) {
    ull code = 0;
    number((void *)1, "count", &code);
    return code ? (int)code : uint_of((void *)1, "gpus", out);
}
int nvmlDeviceGetHandleByIndex_v2(uint index, void **out) {
    ull lost = 0;
    *out = (void *)(size_t)(index + 1);
    number(*out, "lost", &lost);
    return lost ? 15 : 0;
}
int nvmlDeviceGetName(void *gpu, char *out, uint length) { return copy((size_t)gpu - 1, "name", out, length); }
int nvmlDeviceGetUUID(void *gpu, char *out, uint length) { return copy((size_t)gpu - 1, "uuid", out, length); }
int nvmlDeviceGetPciInfo_v3(void *gpu, pci_info *out) {
    memset(out, 0, sizeof *out);
    return copy((size_t)gpu - 1, "pci", out->bus_id, sizeof out->bus_id);
}
int nvmlDeviceGetEccMode(void *gpu, uint *current, uint *pending) {
    *pending = 0;
    return uint_of(gpu, "ecc", current);
}
int nvmlDeviceGetTotalEccErrors(void *gpu, uint kind, uint counter, ull *out) {
    static const char *names[2][2] = {{"corrected", "corrected_ever"}, {"uncorrected", "uncorrected_ever"}};
    return number(gpu, names[kind & 1][counter & 1], out);
}
int nvmlDeviceGetRemappedRows(void *gpu, uint *corrected, uint *uncorrected, uint *pending, uint *failed) {
    *corrected = *uncorrected = *failed = 0;
    uint_of(gpu, "remap_failed", failed);
    return uint_of(gpu, "remap_pending", pending);
}
int nvmlDeviceGetCurrentClocksEventReasons(void *gpu, ull *out) { return number(gpu, "reasons", out); }
int nvmlDeviceGetClockInfo(void *gpu, uint kind, uint *out) { (void)kind; return uint_of(gpu, "clock", out); }
int nvmlDeviceGetMaxClockInfo(void *gpu, uint kind, uint *out) { (void)kind; return uint_of(gpu, "clock_max", out); }
int nvmlDeviceGetPowerManagementLimit(void *gpu, uint *out) { return uint_of(gpu, "power_mw", out); }
int nvmlDeviceGetPowerManagementDefaultLimit(void *gpu, uint *out) { return uint_of(gpu, "power_default_mw", out); }
int nvmlDeviceGetPersistenceMode(void *gpu, uint *out) { return uint_of(gpu, "persistence", out); }
int nvmlDeviceGetMigMode(void *gpu, uint *current, uint *pending) { *pending = 0; return uint_of(gpu, "mig", current); }
int nvmlDeviceGetCurrPcieLinkGeneration(void *gpu, uint *out) { return uint_of(gpu, "pcie", out); }
int nvmlDeviceGetMaxPcieLinkGeneration(void *gpu, uint *out) { return uint_of(gpu, "pcie_max", out); }
int nvmlDeviceGetCurrPcieLinkWidth(void *gpu, uint *out) { return uint_of(gpu, "width", out); }
int nvmlDeviceGetMaxPcieLinkWidth(void *gpu, uint *out) { return uint_of(gpu, "width_max", out); }
int nvmlDeviceGetTopologyCommonAncestor(void *gpu, void *other, uint *out) {
    ull level = 0;
    int code = indexed(gpu, "path", (uint)((size_t)other - 1), &level);
    if (!code) *out = (uint)level;
    return code;
}
int nvmlDeviceGetP2PStatus(void *gpu, void *other, uint capability, uint *out) {
    ull links = 0;
    if (capability != 2) return 3; /* NVML_P2P_CAPS_INDEX_NVLINK */
    int code = indexed(gpu, "nvlinks_to", (uint)((size_t)other - 1), &links);
    if (!code) *out = links ? 0 : 5;
    return code;
}
int nvmlDeviceGetNvLinkState(void *gpu, uint link, uint *out) {
    ull state = 0;
    int code = indexed(gpu, "nvlink", link, &state);
    if (!code) *out = (uint)state;
    return code;
}
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *gpu, uint link, pci_info *out) {
    char name[64];
    snprintf(name, sizeof name, "remote%u", link);
    memset(out, 0, sizeof *out);
    return copy((size_t)gpu - 1, name, out->bus_id, sizeof out->bus_id);
}
int nvmlDeviceGetNvLinkErrorCounter(void *gpu, uint link, uint counter, ull *out) {
    static const char *names[] = {"replays", "recoveries", "crc_flits", "crc_data"};
    ull lacks_counters = 0;
    number(gpu, "no_nvlink_errors", &lacks_counters);
    if (lacks_counters || counter > 3) return 3;
    *out = 0;
    indexed(gpu, names[counter], link, out);
    return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *gpu, uint *count, process_info *out) {
    ull pid;
    if (number(gpu, "process", &pid)) { *count = 0; return 0; }
    if (!out || *count < 1) { *count = 1; return 7; }
    *count = 1;
    out[0] = (process_info){(uint)pid, 512ULL << 20, 0xffffffff, 0xffffffff};
    return 0;
}
int nvmlSystemGetProcessName(uint pid, char *out, uint length) { snprintf(out, length, "python%u", pid % 10); return 0; }
