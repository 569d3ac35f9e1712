package main

import (
	"context"
	"errors"
	"io"
	"os"
	"testing"
)

// TestInput: what comes is read to its end, and a read that waits is over when the context is.
func TestInput(t *testing.T) {
	for _, interrupted := range []bool{false, true} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		in, err := newInput(ctx, r)
		if err != nil {
			t.Fatal(err)
		}
		read := make(chan error, 1)
		got := make([]byte, 8)
		n := 0
		go func() {
			var err error
			n, err = io.ReadFull(in, got)
			read <- err
		}()
		if _, err := w.WriteString("four"); err != nil {
			t.Fatal(err)
		}
		want := io.ErrUnexpectedEOF
		if interrupted {
			cancel()
			want = context.Canceled
		} else if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		// A canceled read need not look at what has come.
		if err := <-read; !errors.Is(err, want) || !interrupted && string(got[:n]) != "four" {
			t.Errorf("interrupted %v: %q, %v", interrupted, got[:n], err)
		}
		cancel()
		if err := errors.Join(in.Close(), r.Close()); err != nil {
			t.Error(err)
		}
		if interrupted {
			w.Close()
		}
	}
}
