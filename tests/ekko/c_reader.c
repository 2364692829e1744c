/* Reads a store through ekko.h, for test_c_header.py.
 *
 * c_reader serve RUN_DIR MODEL TABLE            questions on stdin: uint64 count, keys; answers: uint64 error, dim, rows, stamps
 * c_reader hammer RUN_DIR MODEL TABLE COUNT ROWS   looks up random keys below COUNT until ROWS rows were read; every value of a
 *                                                  row must be the same, and no stamp may go back. Prints rows, torn, back.
 * c_reader arms RUN_DIR MODEL TABLE             questions on stdin: uint64 count, ids; answers: uint64 error, a byte each
 * c_reader ids - - -                            questions on stdin: uint64 count, bytes; answers: uint64, the id of this text
 */
#include "ekko.h"

static void put(const void *bytes, size_t size) {
    if (fwrite(bytes, 1, size, stdout) != size) exit(3);
}

static int serve(ekko_reader *reader) {
    uint64_t count, answer[2];
    while (fread(&count, 8, 1, stdin) == 1) {
        uint64_t *keys = malloc(8 * count + 8), *stamps = malloc(8 * count + 8);
        float *rows;
        if (fread(keys, 8, count, stdin) != count) return 3;
        do {
            rows = malloc(4 * count * reader->dim + 4);
            answer[0] = (uint64_t)ekko_lookup(reader, keys, count, rows, stamps);
            if (answer[0] == EKKO_CHANGED) free(rows);
        } while (answer[0] == EKKO_CHANGED);
        answer[1] = reader->dim;
        put(answer, 16);
        if (!answer[0]) {
            put(rows, 4 * count * reader->dim);
            put(stamps, 8 * count);
        }
        fflush(stdout);
        free(rows);
        free(keys);
        free(stamps);
    }
    return 0;
}

static int hammer(ekko_reader *reader, uint64_t keys_count, uint64_t rows_wanted) {
    enum { BATCH = 256, LOCKED_MAX = 60 };
    uint64_t keys[BATCH], stamps[BATCH], torn = 0, back = 0, done = 0, seed = 1;
    uint64_t *newest = calloc(keys_count, 8);
    float *rows = malloc(sizeof(float) * BATCH * reader->dim);
    for (; done < rows_wanted; done += BATCH) {
        int error, waits = 0;
        for (int i = 0; i < BATCH; i++) keys[i] = (seed = seed * 6364136223846793005ull + 1442695040888963407ull) >> 33, keys[i] %= keys_count;
        /* A writer that does not run for some seconds, on a busy machine, is not dead. */
        while ((error = ekko_lookup(reader, keys, BATCH, rows, stamps)) == EKKO_LOCKED && waits < LOCKED_MAX) waits++;
        if (error) {
            fprintf(stderr, "%s\n", ekko_message(error));
            return 4;
        }
        for (int i = 0; i < BATCH; i++) {
            const float *row = rows + (size_t)i * reader->dim;
            for (uint32_t value = 1; value < reader->dim; value++)
                if (row[value] != row[0]) {
                    torn++;
                    break;
                }
            back += stamps[i] < newest[keys[i]];
            newest[keys[i]] = stamps[i];
        }
    }
    printf("%llu %llu %llu\n", (unsigned long long)done, (unsigned long long)torn, (unsigned long long)back);
    free(rows);
    free(newest);
    return 0;
}

static int arms(ekko_reader *reader) {
    uint64_t count, error;
    while (fread(&count, 8, 1, stdin) == 1) {
        uint64_t *ids = malloc(8 * count + 8);
        uint8_t *found = malloc(count + 1);
        if (fread(ids, 8, count, stdin) != count) return 3;
        error = (uint64_t)ekko_arms(reader, ids, count, found);
        put(&error, 8);
        if (!error) put(found, count);
        fflush(stdout);
        free(found);
        free(ids);
    }
    return 0;
}

static int ids(void) {
    uint64_t count, id;
    while (fread(&count, 8, 1, stdin) == 1) {
        char *text = malloc(count + 1);
        if (fread(text, 1, count, stdin) != count) return 3;
        id = ekko_request_id(text, count);
        put(&id, 8);
        free(text);
    }
    return fflush(stdout);
}

int main(int count, char **words) {
    ekko_reader reader;
    int error, status;
    if (count < 5) return 2;
    if (!strcmp(words[1], "ids")) return ids();
    if ((error = ekko_open(&reader, words[2], words[3], words[4]))) {
        fprintf(stderr, "%s\n", ekko_message(error));
        return 10 + error;
    }
    if (!strcmp(words[1], "arms")) status = arms(&reader);
    else status = count == 5 ? serve(&reader) : hammer(&reader, strtoull(words[5], NULL, 10), strtoull(words[6], NULL, 10));
    ekko_close(&reader);
    return status;
}
