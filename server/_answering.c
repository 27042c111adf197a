/* A load, from the bytes that came to the bytes that go, without anything in between.
 *
 * Called on the server's loop by server/answering.py, which says what it is for. It
 * answers what nearly all loads ask for: the current revision of an object, in a record
 * that is in the page cache, whole, within one read. Whatever is not exactly that is
 * left to the general way, and so are all errors: the answer is None, and nothing has
 * happened. What is answered is to the byte what the general way answers: the request
 * and the answer are described in protocol/loads.py, the record in storage/records.py.
 *
 * What comes from the peer is looked at byte by byte, in a frame of exactly the right
 * size; what comes from the disk is believed for no length beyond what was read. The
 * interpreter is not let go of: RWF_NOWAIT does not wait, and a thread that computes
 * would keep it. Nothing is kept between two calls.
 */

#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>

/* As in records.py: one read, and the fixed part of a record. */
#define READ_BYTES 4096
#define HEADER_BYTES 42
#define ID_BYTES 8
/* An answer without its data: 4 + 2 + 9 + 1 before them, 3 for their length, 10 for the
 * tid, 11 behind it. */
#define FRAME_BYTES_MAX (READ_BYTES + 40)

typedef struct {
    uint64_t number;
    const unsigned char *oid;
    const unsigned char *before;
} load;

typedef struct {
    unsigned char bytes[READ_BYTES];
    const unsigned char *tid;
    const unsigned char *data;
    size_t data_bytes;
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

/* Whether the record of oid is at that position, in memory, whole and with data. */
static int
read_record(int fd, uint64_t position, const unsigned char *oid, record *found)
{
#ifdef RWF_NOWAIT
    struct iovec part = {.iov_base = found->bytes, .iov_len = READ_BYTES};
    ssize_t have = preadv2(fd, &part, 1, (off_t)position, RWF_NOWAIT);
    uint64_t size;

    if (have <= HEADER_BYTES || memcmp(found->bytes, oid, ID_BYTES) != 0) {
        return 0;
    }
    size = big_endian(found->bytes + HEADER_BYTES - 8, 8);
    if (size == 0 || size > (uint64_t)(have - HEADER_BYTES)) {
        return 0;
    }
    found->tid = found->bytes + ID_BYTES;
    found->data = found->bytes + HEADER_BYTES;
    found->data_bytes = (size_t)size;
    return 1;
#else
    (void)fd, (void)position, (void)oid, (void)found;
    return 0;
#endif
}

/* The answer to a request; returns its end. There is room for FRAME_BYTES_MAX. */
static unsigned char *
write_answer(
    unsigned char *frame, uint64_t number, const record *found, const void *as_of)
{
    unsigned char *at = frame + 4;

    at = put(at, "\x93\x03", 2);
    if (number < 0x80) {
        at = put_number(at, number, 1);
    }
    else if (number < 0x100) {
        *at++ = 0xcc;
        at = put_number(at, number, 1);
    }
    else if (number < 0x10000) {
        *at++ = 0xcd;
        at = put_number(at, number, 2);
    }
    else if (number < 0x100000000) {
        *at++ = 0xce;
        at = put_number(at, number, 4);
    }
    else {
        *at++ = 0xcf;
        at = put_number(at, number, 8);
    }
    *at++ = 0x94;
    if (found->data_bytes < 0x100) {
        *at++ = 0xc4;
        at = put_number(at, found->data_bytes, 1);
    }
    else {
        *at++ = 0xc5;
        at = put_number(at, found->data_bytes, 2);
    }
    at = put(at, found->data, found->data_bytes);
    at = put(at, "\xc4\x08", 2);
    at = put(at, found->tid, ID_BYTES);
    at = put(at, "\xc0\xc4\x08", 3);
    at = put(at, as_of, ID_BYTES);
    put_number(frame, (uint64_t)(at - frame - 4), 4);
    return at;
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
    unsigned char frame[FRAME_BYTES_MAX];
    const unsigned char *horizon, *as_of, *before, *end;
    unsigned long long last_request;
    long fd;
    uint64_t position;

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
    fd = PyLong_AsLong(args[2]);
    horizon = id_of(args[4]);
    as_of = id_of(args[5]);
    if (PyErr_Occurred()) {
        return NULL;
    }
    if (asked.number <= last_request) {
        Py_RETURN_NONE;
    }
    position = find(args[3], asked.oid);
    if (position == 0 || !read_record((int)fd, position, asked.oid, &found)) {
        Py_RETURN_NONE;
    }
    before = memcmp(asked.before, horizon, ID_BYTES) > 0 ? horizon : asked.before;
    if (memcmp(found.tid, before, ID_BYTES) >= 0) {
        Py_RETURN_NONE;
    }
    end = write_answer(frame, asked.number, &found, as_of);
    return Py_BuildValue(
        "Ky#", (unsigned long long)asked.number, frame, (Py_ssize_t)(end - frame));
}

static PyMethodDef methods[] = {
    {"answer", (PyCFunction)(void (*)(void))answer, METH_FASTCALL, answer_doc},
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
