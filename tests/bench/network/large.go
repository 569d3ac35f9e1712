package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
)

const (
	largeFile  = 50_000_000
	smallFiles = 2_500
	smallFile  = 100_000
)

// largeImage makes an image of 300 MB: a file of 50 MB between 2,500 of 100 kB, in
// 50 directories. Nothing in it can be compressed.
func largeImage(ctx context.Context, dir string) (name string, err error) {
	name = filepath.Join(dir, "large.erofs")
	f, err := os.Create(name)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	b, err := mkerofs.New(f, mkerofs.Options{})
	if err != nil {
		return "", err
	}
	add := func(path string, size int64) error {
		return b.Add(mkerofs.Entry{
			Path: path, Mode: mkerofs.ModeRegular | 0o644, Mtime: time.Unix(1600000000, 0), Size: size,
			Open: func() (io.ReadCloser, error) {
				seed := [32]byte([]byte(fmt.Sprintf("%-32s", path)))
				return io.NopCloser(io.LimitReader(rand.NewChaCha8(seed), size)), nil
			},
		})
	}
	for i := range smallFiles {
		if i == smallFiles/2 {
			if err := add("data", largeFile); err != nil {
				return "", err
			}
		}
		if err := add(fmt.Sprintf("d%d/f%d", i%50, i), smallFile); err != nil {
			return "", err
		}
	}
	_, err = b.Finish(ctx)
	return name, err
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
