// The threads that compute a step, kept between steps.
#pragma once

namespace bimo {

// Call work(data, number) with number 0 in this thread, and with 1 .. threads - 1 in others that are free by then; returns
// when all that have begun are done. One that is off its core when all is done already is not waited for, so the work
// must be shared out as it is asked for (team.h), not by the number of threads.
void in_parallel(int threads, void (*work)(void* data, int number), void* data);

// How often that was called, in all threads: tests count that a step is one parallel region.
long long parallel_regions();

}  // namespace bimo
