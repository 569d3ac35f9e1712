package blobcache

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Sizes are those of the blobs with this digest and origin of which something is here, in ascending order: for who wants
// to open one, and has nobody to ask how long it is. There are several where somebody lied about one; if some are here as
// a whole, those.
func (c *Cache) Sizes(digest, origin string) ([]int64, error) {
	var sizes []int64
	whole := false
	err := c.find(digest, func(name string, k Kept) {
		if k.Present == 0 && k.Size > 0 || whole && !k.Complete() || nameOf(digest, k.Size, origin) != name {
			return
		}
		if k.Complete() && !whole {
			whole, sizes = true, nil
		}
		sizes = append(sizes, k.Size)
	})
	if err != nil {
		return nil, fmt.Errorf("look for blob %s: %w", digest, err)
	}
	slices.Sort(sizes)
	return slices.Compact(sizes), nil
}

// Has says whether something is here of a blob with this digest, whatever let it in.
func (c *Cache) Has(digest string) (has bool, err error) {
	err = c.find(digest, func(_ string, k Kept) { has = has || k.Present > 0 })
	if err != nil {
		return has, fmt.Errorf("look for blob %s: %w", digest, err)
	}
	return has, nil
}

// find calls f with what is here of a digest, and the name under which it is. What is no blob's file is skipped, and so
// is what is about to be removed.
func (c *Cache) find(digest string, f func(name string, k Kept)) error {
	if err := checkDigest(digest); err != nil {
		return err
	}
	return c.space.locked(c.ctx, func() error {
		names, err := c.names()
		if err != nil {
			return err
		}
		for _, file := range names {
			name, _, _ := parseFileName(file)
			if !strings.HasPrefix(name, digest+"+") {
				continue
			}
			t := &tenant{cache: c, name: file}
			err := t.open(func(d *disk) error {
				k, err := d.kept()
				if err == nil {
					f(name, k)
				}
				return err
			})
			if errors.As(err, new(*headerError)) {
				c.options.Logger.Warn("a file of the cache is of no use", "cache", c.dir.Name(), "err", err)
			} else if err != nil {
				return err
			}
		}
		return nil
	})
}
