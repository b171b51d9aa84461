/* Loaded into a process before its libraries: writes what it looks up and connects to, and lets none of it leave.
 *
 * Each line of the file $NETWORK_LOG is a name that was asked of the resolver, or the address of a peer that is not this
 * machine. Native code is seen too, since it calls the same functions of libc. Look-ups of names other than localhost
 * and connections fail, so that a test needs no network and tells nobody.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void report(const char *name) {
    const char *file = getenv("NETWORK_LOG");
    int fd = file == NULL ? -1 : open(file, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    char line[512];
    int length = snprintf(line, sizeof line, "%.400s\n", name);
    if (fd < 0 || write(fd, line, (size_t)length) != length) abort(); /* a watch that sees nothing must not pass */
    close(fd);
}

/* A name that only another machine could answer for. */
static int is_foreign(const char *name) {
    unsigned char address[16];
    char own[256] = "";
    if (name == NULL || *name == '\0' || strcmp(name, "localhost") == 0) return 0;
    if (inet_pton(AF_INET, name, address) == 1 || inet_pton(AF_INET6, name, address) == 1) return 0;
    return gethostname(own, sizeof own - 1) != 0 || strcmp(name, own) != 0;
}

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **result) {
    if (is_foreign(node)) {
        report(node);
        return EAI_NONAME;
    }
    int (*next)(const char *, const char *, const struct addrinfo *, struct addrinfo **) =
        dlsym(RTLD_NEXT, "getaddrinfo");
    return next(node, service, hints, result);
}

struct hostent *gethostbyname(const char *name) {
    if (is_foreign(name)) {
        report(name);
        h_errno = HOST_NOT_FOUND;
        return NULL;
    }
    struct hostent *(*next)(const char *) = dlsym(RTLD_NEXT, "gethostbyname");
    return next(name);
}

int gethostbyname_r(const char *name, struct hostent *entry, char *buffer, size_t size, struct hostent **result,
                    int *error) {
    if (is_foreign(name)) {
        report(name);
        *result = NULL;
        *error = HOST_NOT_FOUND;
        return 0;
    }
    int (*next)(const char *, struct hostent *, char *, size_t, struct hostent **, int *) =
        dlsym(RTLD_NEXT, "gethostbyname_r");
    return next(name, entry, buffer, size, result, error);
}

/* Whether an address is not this machine's; then it is reported. */
static int leaves(const struct sockaddr *address) {
    char text[INET6_ADDRSTRLEN] = "";
    if (address == NULL) return 0;
    if (address->sa_family == AF_INET) {
        const struct in_addr *to = &((const struct sockaddr_in *)address)->sin_addr;
        unsigned first = ntohl(to->s_addr) >> 24;
        if (first == 127 || first == 0) return 0;
        inet_ntop(AF_INET, to, text, sizeof text);
    } else if (address->sa_family == AF_INET6) {
        const struct in6_addr *to = &((const struct sockaddr_in6 *)address)->sin6_addr;
        if (IN6_IS_ADDR_LOOPBACK(to) || IN6_IS_ADDR_UNSPECIFIED(to)) return 0;
        if (IN6_IS_ADDR_V4MAPPED(to) && to->s6_addr[12] == 127) return 0;
        inet_ntop(AF_INET6, to, text, sizeof text);
    } else {
        return 0;
    }
    report(text);
    return 1;
}

int connect(int fd, const struct sockaddr *address, socklen_t length) {
    if (leaves(address)) {
        errno = ENETUNREACH;
        return -1;
    }
    int (*next)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "connect");
    return next(fd, address, length);
}

ssize_t sendto(int fd, const void *data, size_t size, int flags, const struct sockaddr *address, socklen_t length) {
    if (leaves(address)) {
        errno = ENETUNREACH;
        return -1;
    }
    ssize_t (*next)(int, const void *, size_t, int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "sendto");
    return next(fd, data, size, flags, address, length);
}
