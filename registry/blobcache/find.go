package blobcache

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
)

// Sizes are those of the blobs with this digest and origin of which something may be here, in ascending order: for who
// wants to open one, and has nobody to ask how long it is. There are several where somebody lied about one.
func (c *Cache) Sizes(digest, origin string) ([]int64, error) {
	if err := checkDigest(digest); err != nil {
		return nil, err
	}
	var sizes []int64
	err := c.space.locked(c.ctx, func() error {
		names, err := c.names()
		if err != nil {
			return err
		}
		for _, name := range names {
			of, _, _ := parseFileName(name)
			if !strings.HasPrefix(of, digest+"+") {
				continue
			}
			size, err := c.sizeOf(name)
			if err != nil {
				return err
			}
			if nameOf(digest, size, origin) == of {
				sizes = append(sizes, size)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("look for blob %s: %w", digest, err)
	}
	slices.Sort(sizes)
	return slices.Compact(sizes), nil
}

// sizeOf is what the header of a file says, or -1 where it says nothing. The caller has the directory's lock.
func (c *Cache) sizeOf(name string) (int64, error) {
	d, err := c.openFound(name)
	switch {
	case errors.Is(err, errLocked), errors.Is(err, fs.ErrNotExist):
		return -1, nil // it is about to be removed
	case err != nil:
		c.options.Logger.Warn("a file of the cache is of no use", "error", err)
		return -1, nil
	}
	return d.size, d.close()
}
