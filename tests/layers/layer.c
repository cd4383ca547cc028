/* A file system, and a clock, as other machines have them, put under a program by LD_PRELOAD. For tests.

   LAYER_FLOCK=ENOSYS|ENOLCK|LIES   flock(2) fails so (Lustre by default, NFS without a lock server), or says yes to all
                                    (BeeGFS by default, Lustre with localflock, NFS with nolock)
   LAYER_LATE_S=N, LAYER_BELOW=DIR  a path below DIR that was not there is not there for N more seconds, whatever others
                                    have made meanwhile, unless its directory is listed: NFS's cache of negative lookups
   LAYER_CLOCK_S=N                  the clock is N seconds off

   Source: flock(2); nfs(5), "Directory entry caching" and acdirmin; clock_gettime(2). */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>

#define REMEMBERED 256
#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name)
{
    return dlsym(RTLD_NEXT, name);
}

static struct { char *path; double until; } absent[REMEMBERED];
static int next_absent;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static double now(void)
{
    struct timespec t;
    REAL(clock_gettime)(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static int is_watched(const char *path)
{
    const char *below = getenv("LAYER_BELOW");
    return below && path && getenv("LAYER_LATE_S") && strncmp(path, below, strlen(below)) == 0;
}

/* Whether the path is still taken for absent. */
static int is_absent(const char *path)
{
    int found = 0;
    if (!is_watched(path))
        return 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < REMEMBERED; i++)
        if (absent[i].path && strcmp(absent[i].path, path) == 0)
            found = absent[i].until > now();
    pthread_mutex_unlock(&lock);
    return found;
}

static void remember(const char *path)
{
    if (errno != ENOENT || !is_watched(path))
        return;
    pthread_mutex_lock(&lock);
    free(absent[next_absent].path);
    absent[next_absent].path = strdup(path);
    absent[next_absent].until = now() + atof(getenv("LAYER_LATE_S"));
    next_absent = (next_absent + 1) % REMEMBERED;
    pthread_mutex_unlock(&lock);
    errno = ENOENT;
}

/* Forget what was absent: all in a directory, or one path that this program itself has made. */
static void forget(const char *path, int is_directory)
{
    size_t length = strlen(path);
    pthread_mutex_lock(&lock);
    for (int i = 0; i < REMEMBERED; i++) {
        char *known = absent[i].path;
        if (known && strncmp(known, path, length) == 0 && known[length] == (is_directory ? '/' : '\0'))
            absent[i].until = 0;
    }
    pthread_mutex_unlock(&lock);
}

#define WITH_ABSENCE(path, call)                                                                                       \
    if (is_absent(path)) {                                                                                             \
        errno = ENOENT;                                                                                                \
        return -1;                                                                                                     \
    }                                                                                                                  \
    int result = call;                                                                                                 \
    if (result < 0)                                                                                                    \
        remember(path);                                                                                                \
    return result;

static int open_with(const char *name, const char *path, int flags, mode_t mode)
{
    if (flags & O_CREAT)
        forget(path, 0);
    WITH_ABSENCE(path, ((int (*)(const char *, int, ...))real(name))(path, flags, mode))
}

#define MODE(flags)                                                                                                    \
    mode_t mode = 0;                                                                                                   \
    if (flags & O_CREAT) {                                                                                             \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode = va_arg(more, mode_t);                                                                                   \
        va_end(more);                                                                                                  \
    }

int open(const char *path, int flags, ...)
{
    MODE(flags)
    return open_with("open", path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    MODE(flags)
    return open_with("open64", path, flags, mode);
}

int stat64(const char *path, struct stat64 *found)
{
    WITH_ABSENCE(path, REAL(stat64)(path, found))
}

int stat(const char *path, struct stat *found)
{
    WITH_ABSENCE(path, REAL(stat)(path, found))
}

int lstat(const char *path, struct stat *found)
{
    WITH_ABSENCE(path, REAL(lstat)(path, found))
}

int lstat64(const char *path, struct stat64 *found)
{
    WITH_ABSENCE(path, REAL(lstat64)(path, found))
}

int rename(const char *from, const char *to)
{
    forget(to, 0);
    return REAL(rename)(from, to);
}

DIR *opendir(const char *path)
{
    forget(path, 1);
    return REAL(opendir)(path);
}

int flock(int descriptor, int operation)
{
    const char *how = getenv("LAYER_FLOCK");
    if (!how)
        return ((int (*)(int, int))real("flock"))(descriptor, operation);
    if (strcmp(how, "LIES") == 0)
        return 0;
    errno = strcmp(how, "ENOLCK") == 0 ? ENOLCK : ENOSYS;
    return -1;
}

static long off(void)
{
    const char *said = getenv("LAYER_CLOCK_S");
    return said ? atol(said) : 0;
}

int clock_gettime(clockid_t which, struct timespec *t)
{
    int result = REAL(clock_gettime)(which, t);
    if (result == 0 && which == CLOCK_REALTIME)
        t->tv_sec += off();
    return result;
}

int gettimeofday(struct timeval *t, void *zone)
{
    int result = ((int (*)(struct timeval *, void *))real("gettimeofday"))(t, zone);
    if (result == 0)
        t->tv_sec += off();
    return result;
}

time_t time(time_t *t)
{
    time_t found = REAL(time)(NULL) + off();
    if (t)
        *t = found;
    return found;
}
