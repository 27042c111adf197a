/* A round trip on a blocking socket, with the interpreter let go of once or not at all.
 *
 * Called by client/channel.py from any thread; a socket is used by one thread at a
 * time. client/round_trip.py has its twin and says what it is for. The time limits are
 * the kernel's (SO_SNDTIMEO, SO_RCVTIMEO) and end in the OSError that the methods of a
 * socket raise. Nothing is kept between two calls.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <time.h>

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0 /* Python ignores SIGPIPE. */
#endif

#define PREFIX_BYTES 4
/* On the stack: most answers are smaller, and a large one is put together elsewhere. */
#define STACK_BYTES 16384
/* Whoever gives its core away for longer than this has somebody who wants it. */
#define ALONE_NS 5000

/* One call: what is to be sent, and what has come. */
typedef struct {
    int fd;
    const char *data;
    size_t rest_bytes;
    char *buffer;
    size_t have_bytes;
    size_t size_bytes;
    /* Whether the peer will send no more. */
    int is_over;
} trip;

/* Whether what has come ends a frame, or can hold no more of it. */
static int
is_enough(const trip *t)
{
    const unsigned char *prefix = (const unsigned char *)t->buffer;
    unsigned long length;

    if (t->is_over || t->have_bytes == t->size_bytes) {
        return 1;
    }
    if (t->have_bytes < PREFIX_BYTES) {
        return 0;
    }
    length = (unsigned long)prefix[0] << 24 | (unsigned long)prefix[1] << 16
             | (unsigned long)prefix[2] << 8 | prefix[3];
    /* A frame that does not fit is for the caller to collect. */
    return t->have_bytes - PREFIX_BYTES >= length
           || length > t->size_bytes - PREFIX_BYTES;
}

static long long
monotonic_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* What the kernel says in errno, or 0. Needs no interpreter. */
static int
send_rest(trip *t, int flags)
{
    while (t->rest_bytes) {
        ssize_t sent = send(t->fd, t->data, t->rest_bytes, flags | MSG_NOSIGNAL);
        if (sent < 0) {
            return errno;
        }
        t->data += sent;
        t->rest_bytes -= (size_t)sent;
    }
    return 0;
}

static int
receive_enough(trip *t, int flags)
{
    while (!is_enough(t)) {
        ssize_t received = recv(
            t->fd, t->buffer + t->have_bytes, t->size_bytes - t->have_bytes, flags);
        if (received < 0) {
            return errno;
        }
        t->is_over = received == 0;
        t->have_bytes += (size_t)received;
    }
    return 0;
}

/* Look for the answer for up to look_ns, without letting go of the interpreter; 0 if
 * it came, EAGAIN if it is to be waited for, or an error. */
static int
look(trip *t, long long look_ns)
{
    long long end_ns;
    int error = send_rest(t, MSG_DONTWAIT);

    if (!error) {
        end_ns = monotonic_ns() + look_ns;
        do {
            error = receive_enough(t, MSG_DONTWAIT);
        } while ((error == EAGAIN || error == EWOULDBLOCK) && monotonic_ns() < end_ns);
    }
    return error == EWOULDBLOCK || error == EINTR ? EAGAIN : error;
}

/* Look for the answer for up to watch_ns, unless somebody else wants this core; 0 if it
 * came, EAGAIN if it is to be waited for, or an error. Needs no interpreter. */
static int
watch(trip *t, long long watch_ns)
{
    long long before_ns, now_ns = monotonic_ns();
    long long end_ns = now_ns + watch_ns;
    int error;

    do {
        error = receive_enough(t, MSG_DONTWAIT);
        if (error != EAGAIN && error != EWOULDBLOCK) {
            return error;
        }
        before_ns = monotonic_ns();
        sched_yield();
        now_ns = monotonic_ns();
    } while (now_ns < end_ns && now_ns - before_ns < ALONE_NS);
    return EAGAIN;
}

/* Wait for the answer while other threads run; 0, or an error. A signal's handler runs
 * here, as in a socket's methods; if it raises, the error is EINTR. The first watch_ns
 * are spent awake; is_late tells whether that was in vain. regain_ns tells how long it
 * took to get the interpreter back, the last time. */
static int
await(trip *t, long long watch_ns, long long *regain_ns, int *is_late)
{
    int error;

    do {
        Py_BEGIN_ALLOW_THREADS
        error = send_rest(t, 0);
        if (!error && watch_ns > 0) {
            error = watch(t, watch_ns);
            *is_late = error == EAGAIN;
            error = *is_late ? 0 : error;
            watch_ns = 0;
        }
        if (!error) {
            error = receive_enough(t, 0);
        }
        *regain_ns = monotonic_ns();
        Py_END_ALLOW_THREADS
        *regain_ns = monotonic_ns() - *regain_ns;
    } while (error == EINTR && PyErr_CheckSignals() == 0);
    return error;
}

/* What is to be sent, and where; 0, or -1 with an exception. */
static int
parse(PyObject *const *args, Py_ssize_t count, trip *t, long long times_ns[2])
{
    PyObject *fd;
    Py_ssize_t sending;
    char *data;

    if (count != 4) {
        PyErr_SetString(
            PyExc_TypeError, "exchange takes a socket, bytes and two times");
        return -1;
    }
    if (PyBytes_AsStringAndSize(args[1], &data, &sending) < 0) {
        return -1;
    }
    for (int i = 0; i < 2; i++) {
        times_ns[i] = PyLong_AsLongLong(args[2 + i]);
        if (times_ns[i] == -1 && PyErr_Occurred()) {
            return -1;
        }
    }
    /* Asked for each time: -1 of a closed socket is EBADF, its old number may be
     * somebody else's. */
    fd = PyObject_CallMethod(args[0], "fileno", NULL);
    if (fd == NULL) {
        return -1;
    }
    t->fd = (int)PyLong_AsLong(fd);
    Py_DECREF(fd);
    if (t->fd == -1 && PyErr_Occurred()) {
        return -1;
    }
    t->data = data;
    t->rest_bytes = (size_t)sending;
    return 0;
}

PyDoc_STRVAR(exchange_doc,
"exchange(sock, data, look_ns, watch_ns, /)\n--\n\n"
"Send all of ``data``; return ``(received, regain_ns, is_late)``.\n\n"
"What is received holds a whole frame at least, if that is not too large, or is nothing\n"
"if the peer has ended. It is looked for without letting other threads run for up to\n"
"``look_ns``; ``regain_ns`` is negative if that was enough, else what it took to get\n"
"the interpreter back. Then it is watched for, for up to ``watch_ns``, before the thread\n"
"sleeps; ``is_late`` tells whether that was in vain. Raises OSError as the methods of a\n"
"socket do, and what a signal's handler raises.");

static PyObject *
exchange(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    char buffer[STACK_BYTES];
    trip t = {.buffer = buffer, .size_bytes = sizeof(buffer)};
    long long times_ns[2], regain_ns = -1;
    int error = EAGAIN, is_late = 0;

    (void)module;
    if (parse(args, count, &t, times_ns) < 0) {
        return NULL;
    }
    if (times_ns[0] > 0) {
        error = look(&t, times_ns[0]);
    }
    if (error == EAGAIN) {
        error = await(&t, times_ns[1], &regain_ns, &is_late);
    }
    if (error) {
        if (!PyErr_Occurred()) {
            errno = error;
            PyErr_SetFromErrno(PyExc_OSError);
        }
        return NULL;
    }
    return Py_BuildValue("y#LO", t.buffer, (Py_ssize_t)t.have_bytes, regain_ns,
                         is_late ? Py_True : Py_False);
}

static PyMethodDef methods[] = {
    {"exchange", (PyCFunction)(void (*)(void))exchange, METH_FASTCALL, exchange_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "zeolith.client._round_trip",
    .m_doc = "A round trip on a blocking socket; see client/round_trip.py.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__round_trip(void)
{
    return PyModuleDef_Init(&definition);
}
