package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"

	"github.com/erofs-oci/erofs-oci/tests/start"
)

// table prints what each way costs.
func (b *bench) table(ctx context.Context) error {
	fmt.Printf("%v, %d MB/s; median of %d rounds; load of the machine: %s.\n\n", start.Latency, start.Bandwidth/1_000_000, b.rounds, load())
	fmt.Print("| image | way | s | GETs | for readers | readahead | prefetch | MB |\n|---|---|---|---|---|---|---|---|\n")
	for _, w := range b.ways() {
		if !b.only.MatchString(w.name) {
			continue
		}
		var rounds []cost
		for range b.rounds {
			c, err := b.once(ctx, w)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", w.image, w.name, err)
			}
			rounds = append(rounds, c)
		}
		c := median(rounds)
		fmt.Printf("| %s | %s | %.2f | %d | %s | %.1f |\n", w.image, w.name, c.time.Seconds(), c.gets, c.causes(), float64(c.bytes)/1e6)
	}
	fmt.Printf("\nLoad of the machine at the end: %s.\n", load())
	return nil
}

// causes are the columns of who wanted the GETs.
func (c cost) causes() string {
	if c.by == nil {
		return "| |"
	}
	return strconv.Itoa(c.by.Demand) + " | " + strconv.Itoa(c.by.Readahead) + " | " + strconv.Itoa(c.by.Prefetch)
}

func median(all []cost) cost {
	slices.SortFunc(all, func(a, b cost) int { return cmp.Compare(a.time, b.time) })
	return all[len(all)/2]
}

// load is how busy the machine is, as the kernel says.
func load() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return err.Error()
	}
	words := bytes.Fields(text)
	return string(bytes.Join(words[:min(3, len(words))], []byte(" ")))
}
