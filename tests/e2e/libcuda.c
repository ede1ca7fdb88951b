/* A driver's library that can do nothing but cuCheckpointProcess*, for tests/e2e/checkpoint.rs.
 *
 * A Python process uses a GPU; while it is checkpointed it is stopped, which is worse than what the driver does (only its
 * threads that use the GPU wait). Its state is the file $FAKE_LIBCUDA/<pid>; each step is a line of $FAKE_LIBCUDA/log; a
 * step fails while there is a file $FAKE_LIBCUDA/fail-<step>. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { RUNNING, LOCKED, CHECKPOINTED };
enum { SUCCESS = 0, INVALID_VALUE = 1, ILLEGAL_STATE = 401, NOT_SUPPORTED = 801 };

static const char *path(const char *name)
{
    static _Thread_local char text[4096];
    const char *folder = getenv("FAKE_LIBCUDA");
    snprintf(text, sizeof text, "%s/%s", folder ? folder : "/nonexistent", name);
    return text;
}

static const char *of_process(int pid)
{
    char name[32];
    snprintf(name, sizeof name, "%d", pid);
    return path(name);
}

static int uses_gpu(int pid)
{
    char name[64], words[256];
    snprintf(name, sizeof name, "/proc/%d/cmdline", pid);
    FILE *file = fopen(name, "r");
    if (!file)
        return 0;
    size_t length = fread(words, 1, sizeof words - 1, file);
    fclose(file);
    words[length] = 0;
    return strstr(words, "python") != NULL;
}

int cuCheckpointProcessGetState(int pid, int *state)
{
    if (!uses_gpu(pid))
        return INVALID_VALUE;
    *state = RUNNING;
    FILE *file = fopen(of_process(pid), "r");
    if (file) {
        if (fscanf(file, "%d", state) != 1)
            *state = RUNNING;
        fclose(file);
    }
    return SUCCESS;
}

static int step(const char *name, int pid, int from, int to)
{
    char fail[64];
    int state;
    FILE *log = fopen(path("log"), "a");
    if (log) {
        fprintf(log, "%s\n", name);
        fclose(log);
    }
    snprintf(fail, sizeof fail, "fail-%s", name);
    if (access(path(fail), F_OK) == 0)
        return NOT_SUPPORTED;
    if (cuCheckpointProcessGetState(pid, &state) != SUCCESS || state != from)
        return ILLEGAL_STATE;
    FILE *file = fopen(of_process(pid), "w");
    if (!file)
        return INVALID_VALUE;
    fprintf(file, "%d\n", to);
    fclose(file);
    if (to == CHECKPOINTED)
        kill(pid, SIGSTOP);
    if (from == CHECKPOINTED)
        kill(pid, SIGCONT);
    return SUCCESS;
}

int cuCheckpointProcessLock(int pid, void *args)
{
    /* The time to wait comes first in the arguments, and may not be endless. */
    if (!args || *(unsigned *)args == 0)
        return INVALID_VALUE;
    return step("lock", pid, RUNNING, LOCKED);
}

int cuCheckpointProcessCheckpoint(int pid, void *args)
{
    (void)args;
    return step("checkpoint", pid, LOCKED, CHECKPOINTED);
}

int cuCheckpointProcessRestore(int pid, void *args)
{
    (void)args;
    return step("restore", pid, CHECKPOINTED, LOCKED);
}

int cuCheckpointProcessUnlock(int pid, void *args)
{
    (void)args;
    return step("unlock", pid, LOCKED, RUNNING);
}

int cuGetErrorName(int code, const char **name)
{
    *name = code == NOT_SUPPORTED ? "CUDA_ERROR_NOT_SUPPORTED" : "CUDA_ERROR_ILLEGAL_STATE";
    return SUCCESS;
}
