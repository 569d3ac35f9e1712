package main

import (
	"context"

	"golang.org/x/sync/errgroup"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
)

const (
	streamChunk = 1 << 20
	streamAhead = 4 // chunks of one file that are in memory at a time
)

// stream gives all bytes of a file to sink, in order. What comes next is read
// meanwhile, since it may come from far away.
func stream(ctx context.Context, im *erofsfmt.Image, ino *erofsfmt.Inode, sink func(p []byte, off int64) error) error {
	if ino.Size <= streamChunk {
		p := make([]byte, ino.Size)
		if err := im.ReadFile(ctx, ino, p, 0); err != nil {
			return err
		}
		return sink(p, 0)
	}
	chunks := (ino.Size-1)/streamChunk + 1
	n := min(chunks, streamAhead)
	// Reader i reads chunk i, then i+n, and so on, each after sink is done with
	// the one before.
	all, ctx := errgroup.WithContext(ctx)
	full, empty := make([]chan []byte, n), make([]chan []byte, n)
	for i := range n {
		full[i], empty[i] = make(chan []byte), make(chan []byte, 1)
		empty[i] <- make([]byte, streamChunk)
		all.Go(func() error {
			for c := i; c < chunks; c += n {
				p, err := receive(ctx, empty[i])
				if err != nil {
					return err
				}
				off := c * streamChunk
				p = p[:min(streamChunk, ino.Size-off)]
				if err := im.ReadFile(ctx, ino, p, off); err != nil {
					return err
				}
				if err := send(ctx, full[i], p); err != nil {
					return err
				}
			}
			return nil
		})
	}
	all.Go(func() error {
		for c := range chunks {
			p, err := receive(ctx, full[c%n])
			if err != nil {
				return err
			}
			if err := sink(p, c*streamChunk); err != nil {
				return err
			}
			empty[c%n] <- p
		}
		return nil
	})
	return all.Wait()
}

func receive(ctx context.Context, c <-chan []byte) ([]byte, error) {
	select {
	case p := <-c:
		return p, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func send(ctx context.Context, c chan<- []byte, p []byte) error {
	select {
	case c <- p:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
