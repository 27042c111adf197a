/* A load, from the bytes that came to the bytes that go, without anything in between.
 *
 * Called on the server's loop by server/answering.py, which says what it is for. It
 * answers what nearly all loads ask for: the current revision of an object, in a record
 * that is in the page cache and not very large. Whatever is not exactly that is left to
 * the general way, and so are all errors: the answer is None, and nothing has happened.
 * What is answered is to the byte what the general way answers: the request and the
 * answer are described in protocol/loads.py, the record in storage/records.py.
 *
 * What comes from the peer is looked at byte by byte, in a frame of exactly the right
 * size; what comes from the disk is believed for no length beyond what was read. The
 * interpreter is not let go of: RWF_NOWAIT does not wait, and a thread that computes
 * would keep it. Nothing is kept between two calls.
 */

#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <assert.h>
#include <limits.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>

/* The fixed part of a record. */
#define HEADER_BYTES 42
/* With most records this is all of it, and more takes longer: it is copied. */
#define START_BYTES 1024
/* Of an answer of which the length of the data takes two bytes. */
#define DATA_BYTES_MAX 0xffff
#define ID_BYTES 8

typedef struct {
    uint64_t number;
    const unsigned char *oid;
    const unsigned char *before;
} load;

/* A record whose header is right. */
typedef struct {
    int fd;
    uint64_t position;
    size_t data_bytes;
    /* What was read of it, and how much of that are data. */
    unsigned char start[START_BYTES];
    size_t have_bytes;
} record;

/* The number in size bytes, the first of which counts most. */
static uint64_t
big_endian(const unsigned char *bytes, size_t size)
{
    uint64_t value = 0;
    size_t i;

    for (i = 0; i < size; i++) {
        value = value << 8 | bytes[i];
    }
    return value;
}

static unsigned char *
put_number(unsigned char *at, uint64_t value, size_t size)
{
    size_t i;

    for (i = 0; i < size; i++) {
        at[i] = (unsigned char)(value >> 8 * (size - 1 - i));
    }
    return at + size;
}

static unsigned char *
put(unsigned char *at, const void *bytes, size_t size)
{
    memcpy(at, bytes, size);
    return at + size;
}

/* Whether some bytes are the frame of a load and nothing else. */
static int
read_request(const unsigned char *bytes, size_t size, load *asked)
{
    static const unsigned char middle[] = {
        0xa4, 'l', 'o', 'a', 'd', 0x92, 0xc4, ID_BYTES};
    /* By what is between the kind of the message and its method. */
    size_t fixed_bytes = 4 + 2 + sizeof(middle) + ID_BYTES + 2 + ID_BYTES;
    size_t number_bytes = size - fixed_bytes;
    const unsigned char *at = bytes + 6;

    if (size < fixed_bytes + 1 || size > fixed_bytes + 9) {
        return 0;
    }
    if (big_endian(bytes, 4) != size - 4 || bytes[4] != 0x94 || bytes[5] != 0x02) {
        return 0;
    }
    if (number_bytes == 1) {
        if (*at >= 0x80) {
            return 0;
        }
    }
    else {
        unsigned char mark = *at++;
        number_bytes--;
        if (!(number_bytes == 1 && mark == 0xcc) && !(number_bytes == 2 && mark == 0xcd)
            && !(number_bytes == 4 && mark == 0xce)
            && !(number_bytes == 8 && mark == 0xcf))
        {
            return 0;
        }
    }
    asked->number = big_endian(at, number_bytes);
    at += number_bytes;
    if (memcmp(at, middle, sizeof(middle)) != 0) {
        return 0;
    }
    asked->oid = at + sizeof(middle);
    at = asked->oid + ID_BYTES;
    if (at[0] != 0xc4 || at[1] != ID_BYTES) {
        return 0;
    }
    asked->before = at + 2;
    return 1;
}

/* What buckets[key] is, or NULL without an exception. */
static PyObject *
item(PyObject *buckets, const unsigned char *key, Py_ssize_t size)
{
    PyObject *found = NULL;
    PyObject *bytes = PyBytes_FromStringAndSize((const char *)key, size);

    if (bytes != NULL) {
        found = PyObject_GetItem(buckets, bytes);
        Py_DECREF(bytes);
    }
    if (found == NULL) {
        /* It is asked for again, the general way. */
        PyErr_Clear();
    }
    return found;
}

/* Where the record of oid is, or 0. An fsIndex has a tree of buckets by the first six
 * bytes of the oid, and in each, by the last two, six bytes. */
static uint64_t
find(PyObject *buckets, const unsigned char *oid)
{
    uint64_t position = 0;
    PyObject *place, *bucket = item(buckets, oid, 6);

    if (bucket == NULL) {
        return 0;
    }
    place = item(bucket, oid + 6, 2);
    Py_DECREF(bucket);
    if (place == NULL) {
        return 0;
    }
    if (PyBytes_CheckExact(place) && PyBytes_GET_SIZE(place) == 6) {
        position = big_endian((const unsigned char *)PyBytes_AS_STRING(place), 6);
    }
    Py_DECREF(place);
    return position;
}

/* What can be read of a file without waiting for the disk; negative if nothing. */
static ssize_t
read_near(int fd, void *bytes, size_t size, uint64_t position)
{
#ifdef RWF_NOWAIT
    struct iovec part = {.iov_base = bytes, .iov_len = size};
    return preadv2(fd, &part, 1, (off_t)position, RWF_NOWAIT);
#else
    (void)fd, (void)bytes, (void)size, (void)position;
    return -1;
#endif
}

/* Whether the current record of oid is in memory, has data, and is before that tid. */
static int
find_record(
    int fd, PyObject *buckets, const unsigned char *oid, const unsigned char *before,
    record *found)
{
    ssize_t have;
    uint64_t size;

    found->fd = fd;
    found->position = find(buckets, oid);
    if (found->position == 0) {
        return 0;
    }
    have = read_near(fd, found->start, START_BYTES, found->position);
    if (have <= HEADER_BYTES || memcmp(found->start, oid, ID_BYTES) != 0
        || memcmp(found->start + ID_BYTES, before, ID_BYTES) >= 0)
    {
        return 0;
    }
    size = big_endian(found->start + HEADER_BYTES - 8, 8);
    if (size == 0 || size > DATA_BYTES_MAX) {
        return 0;
    }
    found->data_bytes = (size_t)size;
    found->have_bytes = (size_t)have - HEADER_BYTES;
    if (found->have_bytes > found->data_bytes) {
        found->have_bytes = found->data_bytes;
    }
    return 1;
}

/* All of a record's data, where there is room for data_bytes; 0 if they are not near. */
static int
read_data(const record *found, unsigned char *data)
{
    size_t rest = found->data_bytes - found->have_bytes;
    ssize_t have;

    memcpy(data, found->start + HEADER_BYTES, found->have_bytes);
    if (rest == 0) {
        return 1;
    }
    have = read_near(
        found->fd, data + found->have_bytes, rest,
        found->position + HEADER_BYTES + found->have_bytes);
    return have >= 0 && (size_t)have == rest;
}

/* How many bytes msgpack takes for a number, its mark included. */
static size_t
size_of_number(uint64_t number)
{
    if (number < 0x80) {
        return 1;
    }
    if (number < 0x10000) {
        return number < 0x100 ? 2 : 3;
    }
    return number < 0x100000000 ? 5 : 9;
}

static unsigned char *
put_marked(unsigned char *at, uint64_t number)
{
    size_t size = size_of_number(number);

    if (size > 1) {
        *at++ = size == 2 ? 0xcc : size == 3 ? 0xcd : size == 5 ? 0xce : 0xcf;
        size--;
    }
    return put_number(at, number, size);
}

/* The frame that answers a request, or NULL, with or without an exception. */
static PyObject *
frame_of(uint64_t number, const record *found, const unsigned char *as_of)
{
    size_t length_bytes = found->data_bytes < 0x100 ? 1 : 2;
    size_t size = 4 + 2 + size_of_number(number) + 1 + 1 + length_bytes
                  + found->data_bytes + 2 + ID_BYTES + 3 + ID_BYTES;
    PyObject *frame = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size);
    unsigned char *at;

    if (frame == NULL) {
        return NULL;
    }
    at = (unsigned char *)PyBytes_AS_STRING(frame);
    at = put_number(at, size - 4, 4);
    at = put(at, "\x93\x03", 2);
    at = put_marked(at, number);
    at = put(at, length_bytes == 1 ? "\x94\xc4" : "\x94\xc5", 2);
    at = put_number(at, found->data_bytes, length_bytes);
    if (!read_data(found, at)) {
        Py_DECREF(frame);
        return NULL;
    }
    at = put(at + found->data_bytes, "\xc4\x08", 2);
    at = put(at, found->start + ID_BYTES, ID_BYTES);
    at = put(at, "\xc0\xc4\x08", 3);
    at = put(at, as_of, ID_BYTES);
    assert(at == (unsigned char *)PyBytes_AS_STRING(frame) + size);
    return frame;
}

/* The eight bytes of an id, or NULL with an exception. */
static const unsigned char *
id_of(PyObject *argument)
{
    if (!PyBytes_CheckExact(argument) || PyBytes_GET_SIZE(argument) != ID_BYTES) {
        PyErr_SetString(PyExc_TypeError, "an id is eight bytes");
        return NULL;
    }
    return (const unsigned char *)PyBytes_AS_STRING(argument);
}

/* 0, or -1 with an exception. */
static int
descriptor_of(PyObject *argument, int *fd)
{
    long value = PyLong_AsLong(argument);

    if (value == -1 && PyErr_Occurred()) {
        return -1;
    }
    if (value < INT_MIN || value > INT_MAX) {
        PyErr_SetString(PyExc_OverflowError, "no descriptor is so large");
        return -1;
    }
    *fd = (int)value;
    return 0;
}

PyDoc_STRVAR(answer_doc,
"answer(data, last_request, fd, buckets, horizon, as_of, /)\n--\n\n"
"What ``data`` asks for and its answer, ``(number, frame)``, or None.\n\n"
"None is for all that is no load, or a load that is not answered here; then nothing\n"
"has happened. ``last_request`` is the number of the request before, ``buckets`` the\n"
"tree of an fsIndex; ``horizon`` and ``as_of`` are tids.");

static PyObject *
answer(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    load asked;
    record found;
    const unsigned char *horizon, *as_of, *before;
    unsigned long long last_request;
    int fd;
    PyObject *frame, *number, *answered = NULL;

    (void)module;
    if (count != 6) {
        PyErr_SetString(PyExc_TypeError, "answer takes six arguments");
        return NULL;
    }
    if (!PyBytes_CheckExact(args[0])
        || !read_request(
            (const unsigned char *)PyBytes_AS_STRING(args[0]),
            (size_t)PyBytes_GET_SIZE(args[0]), &asked))
    {
        Py_RETURN_NONE;
    }
    last_request = PyLong_AsUnsignedLongLong(args[1]);
    if (last_request == (unsigned long long)-1 && PyErr_Occurred()) {
        return NULL;
    }
    if (descriptor_of(args[2], &fd) < 0 || (horizon = id_of(args[4])) == NULL
        || (as_of = id_of(args[5])) == NULL)
    {
        return NULL;
    }
    before = memcmp(asked.before, horizon, ID_BYTES) > 0 ? horizon : asked.before;
    if (asked.number <= last_request
        || !find_record(fd, args[3], asked.oid, before, &found))
    {
        Py_RETURN_NONE;
    }
    frame = frame_of(asked.number, &found, as_of);
    if (frame == NULL) {
        PyErr_Clear();
        Py_RETURN_NONE;
    }
    number = PyLong_FromUnsignedLongLong(asked.number);
    if (number != NULL) {
        answered = PyTuple_Pack(2, number, frame);
        Py_DECREF(number);
    }
    Py_DECREF(frame);
    return answered;
}

PyDoc_STRVAR(load_doc,
"load(oid, before, fd, buckets, /)\n--\n\n"
"The revision ``(data, tid, None)``, or None for what is not loaded here.");

static PyObject *
load_one(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    record found;
    const unsigned char *oid, *before;
    int fd;
    PyObject *data, *tid, *revision = NULL;

    (void)module;
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "load takes four arguments");
        return NULL;
    }
    if ((oid = id_of(args[0])) == NULL || (before = id_of(args[1])) == NULL
        || descriptor_of(args[2], &fd) < 0)
    {
        return NULL;
    }
    if (!find_record(fd, args[3], oid, before, &found)) {
        Py_RETURN_NONE;
    }
    data = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)found.data_bytes);
    if (data == NULL) {
        return NULL;
    }
    if (!read_data(&found, (unsigned char *)PyBytes_AS_STRING(data))) {
        Py_DECREF(data);
        Py_RETURN_NONE;
    }
    tid = PyBytes_FromStringAndSize((const char *)found.start + ID_BYTES, ID_BYTES);
    if (tid != NULL) {
        revision = PyTuple_Pack(3, data, tid, Py_None);
        Py_DECREF(tid);
    }
    Py_DECREF(data);
    return revision;
}

static PyMethodDef methods[] = {
    {"answer", (PyCFunction)(void (*)(void))answer, METH_FASTCALL, answer_doc},
    {"load", (PyCFunction)(void (*)(void))load_one, METH_FASTCALL, load_doc},
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
    .m_name = "zeolith.server._answering",
    .m_doc = "A load and its answer in one call; see server/answering.py.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__answering(void)
{
    return PyModuleDef_Init(&definition);
}
