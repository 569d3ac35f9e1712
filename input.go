package main

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// An input reads a file that may have nothing to give for as long as it likes, a pipe or a terminal, until its context
// ends: a read(2) that waits is ended by no signal that the program catches.
type input struct {
	ctx         context.Context
	f           *os.File
	wake, waker *os.File // a pipe, whose one end is closed when the context ends
	stop        func() bool
}

func newInput(ctx context.Context, f *os.File) (*input, error) {
	wake, waker, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	// To close it twice does no harm.
	return &input{ctx, f, wake, waker, context.AfterFunc(ctx, func() { _ = waker.Close() })}, nil
}

func (in *input) Read(p []byte) (int, error) {
	for {
		ready := []unix.PollFd{{Fd: int32(in.f.Fd()), Events: unix.POLLIN}, {Fd: int32(in.wake.Fd())}}
		_, err := unix.Poll(ready, -1)
		switch {
		case in.ctx.Err() != nil:
			return 0, in.ctx.Err()
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, os.NewSyscallError("poll", err)
		default:
			return in.f.Read(p)
		}
	}
}

// Close lets go of all but the file.
func (in *input) Close() error {
	in.stop()
	_ = in.waker.Close() // unless the context has ended
	return in.wake.Close()
}
