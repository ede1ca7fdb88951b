/*
 * A disk that can be watched and made to fail: preloaded into a process under test, it stands between libc's file calls and
 * their callers. Only files below one folder are concerned; SQLite's -shm files are not, since nothing durable is in them.
 *
 *   FAULT_DISK_DIR    the folder, an absolute path
 *   FAULT_DISK_LOG    where to record, in order, each change, each sync, and each write to stdout (see `record`)
 *   FAULT_DISK_FAULT  what goes wrong; counted from 1:
 *                       write-eio:N[:COUNT]  the N-th write, and COUNT - 1 more, end in EIO
 *                       sync-eio:N[:COUNT]   the same with fsync and fdatasync
 *                       short:N[:COUNT]      that write stores the first half only, and says so
 *                       enospc:BYTES         after so many bytes nothing can be written or made: ENOSPC
 *                       erofs:N              from the N-th change on, as on a disk that the kernel made read-only
 *                       slow-sync:MS         each sync takes so much longer
 *                       hold-sync:1          each sync waits until FAULT_DISK_ARM is gone
 *   FAULT_DISK_ARM    if set: nothing goes wrong unless this file exists; counting begins when it is first seen
 *   FAULT_DISK_ONLY   if set: only files whose path ends so go wrong
 *
 * The environment is cleared of LD_PRELOAD, so that children run without.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OPEN = 1, WRITE, TRUNCATE, RENAME, UNLINK, LINK, MKDIR, RMDIR, SYNC, OUTPUT, ALLOCATE };
enum { CREATED = 1, TRUNCATED = 2, FOLDER = 4 };
enum kind { NONE, WRITE_EIO, SYNC_EIO, SHORT, ENOSPC_AFTER, EROFS_FROM, SLOW_SYNC, HOLD_SYNC };

/* One line of the log; `paths` and `data` bytes follow. */
struct __attribute__((packed)) head {
    uint8_t op, flags;
    uint16_t paths;
    uint32_t file;
    uint64_t offset, data;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static char folder[PATH_MAX], arm[PATH_MAX], only[256];
static size_t folder_len;
static int log_fd = -1;

static struct {
    enum kind kind;
    uint64_t first, count;
    uint64_t writes, syncs, changes, bytes;
} fault;

/* Files that were opened, by inode. */
#define FILES 16384
static struct file {
    dev_t dev;
    ino_t ino;
    uint32_t id;
    int in_use, concerned;
} files[FILES];
static uint32_t last_id;

static void copy(char *to, size_t size, const char *from) {
    if (from) snprintf(to, size, "%s", from);
}

static void read_fault(const char *text) {
    static const struct { const char *name; enum kind kind; } kinds[] = {
        {"write-eio:", WRITE_EIO}, {"sync-eio:", SYNC_EIO}, {"short:", SHORT},
        {"enospc:", ENOSPC_AFTER}, {"erofs:", EROFS_FROM}, {"slow-sync:", SLOW_SYNC}, {"hold-sync:", HOLD_SYNC},
    };
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        size_t len = strlen(kinds[i].name);
        if (strncmp(text, kinds[i].name, len)) continue;
        char *end;
        fault.first = strtoull(text + len, &end, 10);
        fault.count = *end == ':' ? strtoull(end + 1, NULL, 10) : 1;
        fault.kind = kinds[i].kind;
        return;
    }
    fprintf(stderr, "disk.c: FAULT_DISK_FAULT=%s is unknown\n", text);
    abort();
}

static void set_up(void) {
    const char *dir = getenv("FAULT_DISK_DIR"), *log = getenv("FAULT_DISK_LOG"), *text = getenv("FAULT_DISK_FAULT");
    if (!dir) return;
    copy(folder, sizeof folder, dir);
    folder_len = strlen(folder);
    copy(arm, sizeof arm, getenv("FAULT_DISK_ARM"));
    copy(only, sizeof only, getenv("FAULT_DISK_ONLY"));
    if (text) read_fault(text);
    if (log) {
        log_fd = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
        if (log_fd < 0) abort();
    }
    unsetenv("LD_PRELOAD");
}

__attribute__((constructor)) static void begin(void) { pthread_once(&once, set_up); }

static void enter(void) {
    pthread_once(&once, set_up);
    pthread_mutex_lock(&lock);
}

static void leave(void) {
    int kept = errno;
    pthread_mutex_unlock(&lock);
    errno = kept;
}

static void record(uint8_t op, uint8_t flags, uint32_t file, uint64_t offset, const char *path, const char *path2,
                   const void *data, uint64_t len) {
    if (log_fd < 0) return;
    char paths[2 * PATH_MAX] = "";
    size_t size = 0;
    if (path) size = (size_t)snprintf(paths, PATH_MAX, "%s", path) + 1;
    if (path2) size += (size_t)snprintf(paths + size, PATH_MAX, "%s", path2) + 1;
    struct head head = {op, flags, (uint16_t)size, file, offset, data ? len : 0};
    struct iovec parts[3] = {{&head, sizeof head}, {paths, size}, {(void *)data, data ? len : 0}};
    int kept = errno;
    if (syscall(SYS_writev, log_fd, parts, 3) != (long)(sizeof head + size + (data ? len : 0))) abort();
    errno = kept;
}

/* The absolute path below the folder, or NULL if it is none of ours. */
static const char *ours(int at, const char *path, char *buffer) {
    if (!folder_len || !path) return NULL;
    if (*path != '/') {
        char link[64];
        if (at == AT_FDCWD) return NULL;
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        ssize_t len = syscall(SYS_readlinkat, AT_FDCWD, link, buffer, PATH_MAX - 1);
        if (len < 0) return NULL;
        snprintf(buffer + len, PATH_MAX - (size_t)len, *path ? "/%s" : "%s", path);
        path = buffer;
    }
    if (strncmp(path, folder, folder_len) || (path[folder_len] != '/' && path[folder_len])) return NULL;
    size_t len = strlen(path);
    if (len > 4 && !strcmp(path + len - 4, "-shm")) return NULL;
    return path;
}

static int concerned(const char *path) {
    size_t len = strlen(path), end = strlen(only);
    return len >= end && !strcmp(path + len - end, only);
}

static int is_armed(void) { return !*arm || syscall(SYS_faccessat, AT_FDCWD, arm, F_OK) == 0; }

/* A file's place in the table. Files that have gone keep theirs, without a number, until their inode is used again. */
static struct file *slot(dev_t dev, ino_t ino, int make) {
    for (size_t i = 0; i < FILES; i++) {
        struct file *file = &files[(ino + i) % FILES];
        if (file->in_use && file->dev == dev && file->ino == ino) return file;
        if (!file->in_use) {
            if (!make) return NULL;
            *file = (struct file){dev, ino, 0, 1, 0};
            return file;
        }
    }
    abort();
}

static struct file *known(int fd) {
    struct stat stat;
    if (!folder_len || last_id == 0 || fstat(fd, &stat)) return NULL;
    struct file *file = slot(stat.st_dev, stat.st_ino, 0);
    return file && file->id ? file : NULL;
}

/* The file of this name, if the name is its last one and is about to go. */
static struct file *about_to_go(const char *path) {
    struct stat stat;
    if (!path || lstat(path, &stat) || S_ISDIR(stat.st_mode) || stat.st_nlink > 1) return NULL;
    return slot(stat.st_dev, stat.st_ino, 0);
}

static void opened(int fd, const char *path, int flags, int existed) {
    struct stat stat;
    if (fstat(fd, &stat)) return;
    struct file *file = slot(stat.st_dev, stat.st_ino, 1);
    uint8_t how = S_ISDIR(stat.st_mode) ? FOLDER : 0;
    if (!existed) how |= CREATED;
    if (existed && (flags & O_TRUNC)) how |= TRUNCATED;
    if (!existed || !file->id) file->id = ++last_id;
    file->concerned = concerned(path);
    record(OPEN, how, file->id, 0, path, NULL, NULL, 0);
}

static int nth(uint64_t now) { return now >= fault.first && now < fault.first + fault.count; }

/* What a change of the folder's names or of a file's length ends in: 0, or an errno. */
static int change_fails(const char *path, int grows) {
    if (fault.kind == NONE || !concerned(path) || !is_armed()) return 0;
    fault.changes++;
    if (fault.kind == EROFS_FROM && fault.changes >= fault.first) return EROFS;
    if (fault.kind == ENOSPC_AFTER && grows && fault.bytes >= fault.first) return ENOSPC;
    return 0;
}

/* How much of a write is done; negative: an errno. */
static ssize_t write_allowed(const struct file *file, size_t len) {
    if (fault.kind == NONE || !file->concerned || !is_armed()) return (ssize_t)len;
    fault.writes++;
    fault.changes++;
    switch (fault.kind) {
    case WRITE_EIO: return nth(fault.writes) ? -EIO : (ssize_t)len;
    case SHORT: return nth(fault.writes) && len > 1 ? (ssize_t)(len / 2) : (ssize_t)len;
    case EROFS_FROM: return fault.changes >= fault.first ? -EROFS : (ssize_t)len;
    case ENOSPC_AFTER: {
        uint64_t left = fault.first > fault.bytes ? fault.first - fault.bytes : 0;
        size_t now = len < left ? len : (size_t)left;
        fault.bytes += now;
        return now || !len ? (ssize_t)now : -ENOSPC;
    }
    default: return (ssize_t)len;
    }
}

static ssize_t fail(int error) {
    leave();
    errno = error;
    return -1;
}

/* ---- writes ---------------------------------------------------------------------------------------------------- */

static ssize_t write_at(int fd, const void *data, size_t len, off_t offset, int positioned) {
    enter();
    struct file *file = known(fd);
    ssize_t allowed = file ? write_allowed(file, len) : (ssize_t)len;
    if (allowed < 0) return fail((int)-allowed);
    ssize_t done = positioned ? syscall(SYS_pwrite64, fd, data, (size_t)allowed, offset)
                              : syscall(SYS_write, fd, data, (size_t)allowed);
    if (done > 0 && file) {
        off_t begin = positioned ? offset : lseek(fd, 0, SEEK_CUR) - done;
        record(WRITE, 0, file->id, (uint64_t)begin, NULL, NULL, data, (uint64_t)done);
    } else if (done > 0 && fd == 1) {
        record(OUTPUT, 0, 0, 0, NULL, NULL, data, (uint64_t)done);
    }
    leave();
    return done;
}

ssize_t write(int fd, const void *data, size_t len) { return write_at(fd, data, len, 0, 0); }
ssize_t pwrite(int fd, const void *data, size_t len, off_t offset) { return write_at(fd, data, len, offset, 1); }
ssize_t pwrite64(int fd, const void *data, size_t len, off64_t offset) { return write_at(fd, data, len, offset, 1); }

static ssize_t gather(int fd, const struct iovec *parts, int count, off_t offset, int positioned) {
    enter();
    int is_ours = known(fd) != NULL || fd == 1;
    leave();
    if (!is_ours)
        return positioned ? syscall(SYS_pwritev, fd, parts, count, offset, 0) : syscall(SYS_writev, fd, parts, count);
    size_t len = 0, at = 0;
    for (int i = 0; i < count; i++) len += parts[i].iov_len;
    char *all = malloc(len ? len : 1);
    if (!all) abort();
    for (int i = 0; i < count; at += parts[i++].iov_len) memcpy(all + at, parts[i].iov_base, parts[i].iov_len);
    ssize_t done = write_at(fd, all, len, offset, positioned);
    int kept = errno;
    free(all);
    errno = kept;
    return done;
}

ssize_t writev(int fd, const struct iovec *parts, int count) { return gather(fd, parts, count, 0, 0); }
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) { return gather(fd, parts, count, offset, 1); }
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset) {
    return gather(fd, parts, count, offset, 1);
}

/* Nobody who asks for these is left without: callers go on with read and write. */
ssize_t copy_file_range(int in, off64_t *in_at, int out, off64_t *out_at, size_t len, unsigned flags) {
    enter();
    struct file *file = known(out);
    leave();
    if (!file) return syscall(SYS_copy_file_range, in, in_at, out, out_at, len, flags);
    errno = EXDEV;
    return -1;
}

static ssize_t send_file(int out, int in, off_t *at, size_t len) {
    enter();
    struct file *file = known(out);
    leave();
    if (!file) return syscall(SYS_sendfile, out, in, at, len);
    errno = EINVAL;
    return -1;
}

ssize_t sendfile(int out, int in, off_t *at, size_t len) { return send_file(out, in, at, len); }
ssize_t sendfile64(int out, int in, off64_t *at, size_t len) { return send_file(out, in, at, len); }

/* ---- lengths --------------------------------------------------------------------------------------------------- */

static int cut(int fd, off_t len) {
    enter();
    struct file *file = known(fd);
    int error = file && file->concerned ? change_fails(only, 0) : 0; /* a path that ends so */
    if (error) return (int)fail(error);
    int done = (int)syscall(SYS_ftruncate, fd, len);
    if (!done && file) record(TRUNCATE, 0, file->id, (uint64_t)len, NULL, NULL, NULL, 0);
    leave();
    return done;
}

int ftruncate(int fd, off_t len) { return cut(fd, len); }
int ftruncate64(int fd, off64_t len) { return cut(fd, len); }

static int allocate(int fd, int mode, off_t offset, off_t len) {
    enter();
    struct file *file = known(fd);
    int error = file && file->concerned ? change_fails(only, 1) : 0;
    if (error) return (int)fail(error);
    int done = (int)syscall(SYS_fallocate, fd, mode, offset, len);
    if (!done && file && mode == 0) record(ALLOCATE, 0, file->id, (uint64_t)(offset + len), NULL, NULL, NULL, 0);
    leave();
    return done;
}

int fallocate(int fd, int mode, off_t offset, off_t len) { return allocate(fd, mode, offset, len); }
int fallocate64(int fd, int mode, off64_t offset, off64_t len) { return allocate(fd, mode, offset, len); }
int posix_fallocate(int fd, off_t offset, off_t len) { return allocate(fd, 0, offset, len) ? errno : 0; }
int posix_fallocate64(int fd, off64_t offset, off64_t len) { return allocate(fd, 0, offset, len) ? errno : 0; }

/* ---- syncs ----------------------------------------------------------------------------------------------------- */

static int sync_fd(int fd, long call) {
    enter();
    struct file *file = known(fd);
    if (file && file->concerned && fault.kind != NONE && is_armed()) {
        fault.syncs++;
        if (fault.kind == SYNC_EIO && nth(fault.syncs)) return (int)fail(EIO);
        if (fault.kind == EROFS_FROM && fault.changes >= fault.first) return (int)fail(EROFS);
        if (fault.kind == SLOW_SYNC) {
            leave();
            struct timespec nap = {(time_t)(fault.first / 1000), (long)(fault.first % 1000) * 1000000};
            nanosleep(&nap, NULL);
            enter();
        }
        while (fault.kind == HOLD_SYNC && is_armed()) {
            leave();
            struct timespec nap = {0, 5000000};
            nanosleep(&nap, NULL);
            enter();
        }
    }
    /* Held, so that the log says exactly which writes came before. */
    int done = (int)syscall(call, fd);
    if (!done && file) record(SYNC, 0, file->id, 0, NULL, NULL, NULL, 0);
    leave();
    return done;
}

int fsync(int fd) { return sync_fd(fd, SYS_fsync); }
int fdatasync(int fd) { return sync_fd(fd, SYS_fdatasync); }

/* ---- names ----------------------------------------------------------------------------------------------------- */

static int open_at(int at, const char *name, int flags, mode_t mode) {
    char buffer[PATH_MAX];
    enter();
    const char *path = ours(at, name, buffer);
    if (!path) {
        leave();
        return (int)syscall(SYS_openat, at, name, flags, mode);
    }
    int existed = syscall(SYS_faccessat, AT_FDCWD, path, F_OK) == 0;
    int changes = (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC));
    int error = changes ? change_fails(path, !existed) : 0;
    if (error) return (int)fail(error);
    int fd = (int)syscall(SYS_openat, at, name, flags, mode);
    if (fd >= 0 && (flags & O_PATH) == 0) opened(fd, path, flags, existed);
    leave();
    return fd;
}

#define MODE(flags, mode)                                  \
    mode_t mode = 0;                                       \
    if ((flags) & (O_CREAT | O_TMPFILE)) {                 \
        va_list more;                                      \
        va_start(more, flags);                             \
        mode = (mode_t)va_arg(more, int);                  \
        va_end(more);                                      \
    }

int open(const char *path, int flags, ...) { MODE(flags, mode) return open_at(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags, mode) return open_at(AT_FDCWD, path, flags | O_LARGEFILE, mode); }
int openat(int at, const char *path, int flags, ...) { MODE(flags, mode) return open_at(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE(flags, mode) return open_at(at, path, flags | O_LARGEFILE, mode); }
int creat(const char *path, mode_t mode) { return open_at(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

/* A call that takes one path or two. */
static int name_call(uint8_t op, int at, const char *from, int at2, const char *to, long call, long more, int grows) {
    char buffer[PATH_MAX], buffer2[PATH_MAX];
    enter();
    const char *path = ours(at, from, buffer), *path2 = to ? ours(at2, to, buffer2) : NULL;
    const char *named = path2 ? path2 : path;
    int error = named ? change_fails(named, grows) : 0;
    if (error) return (int)fail(error);
    struct file *gone = op == UNLINK ? about_to_go(path) : op == RENAME ? about_to_go(path2) : NULL;
    int done = (int)(to ? syscall(call, at, from, at2, to, more) : syscall(call, at, from, more));
    if (!done && gone) gone->id = 0;
    if (!done && named) {
        /* In or out of the folder is nothing that a log of the folder can tell. */
        if (to && !(path && path2)) {
            fprintf(stderr, "disk.c: %s -> %s crosses the border of the folder\n", from, to);
            abort();
        }
        record(op, 0, 0, 0, path, path2, NULL, 0);
    }
    leave();
    return done;
}

int rename(const char *from, const char *to) {
    return name_call(RENAME, AT_FDCWD, from, AT_FDCWD, to, SYS_renameat2, 0, 0);
}
int renameat(int at, const char *from, int at2, const char *to) {
    return name_call(RENAME, at, from, at2, to, SYS_renameat2, 0, 0);
}
int renameat2(int at, const char *from, int at2, const char *to, unsigned flags) {
    return name_call(RENAME, at, from, at2, to, SYS_renameat2, flags, 0);
}
int link(const char *from, const char *to) { return name_call(LINK, AT_FDCWD, from, AT_FDCWD, to, SYS_linkat, 0, 1); }
int linkat(int at, const char *from, int at2, const char *to, int flags) {
    return name_call(LINK, at, from, at2, to, SYS_linkat, flags, 1);
}
int unlink(const char *path) { return name_call(UNLINK, AT_FDCWD, path, 0, NULL, SYS_unlinkat, 0, 0); }
int unlinkat(int at, const char *path, int flags) {
    return name_call(flags & AT_REMOVEDIR ? RMDIR : UNLINK, at, path, 0, NULL, SYS_unlinkat, flags, 0);
}
int rmdir(const char *path) { return name_call(RMDIR, AT_FDCWD, path, 0, NULL, SYS_unlinkat, AT_REMOVEDIR, 0); }
int mkdir(const char *path, mode_t mode) { return name_call(MKDIR, AT_FDCWD, path, 0, NULL, SYS_mkdirat, (long)mode, 1); }
int mkdirat(int at, const char *path, mode_t mode) { return name_call(MKDIR, at, path, 0, NULL, SYS_mkdirat, (long)mode, 1); }
