package blobcache

import (
	"math/rand/v2"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// Each other lock counts once, in whatever order the holders came, and those outside of the range and our own do not.
func TestOthersHold(t *testing.T) {
	const off, n = 1 << 40, 1 << 20
	type held struct {
		off, n int64
		kind   int16
	}
	spread := func(count int) (list []held) {
		rng := rand.New(rand.NewPCG(1, uint64(count)))
		for _, place := range rng.Perm(n / 2)[:count] { // not side by side, which would be one lock if one file had both
			list = append(list, held{off + 2*int64(place), 1, unix.F_WRLCK})
		}
		return list
	}
	for _, test := range []struct {
		name   string
		others []held
		own    []held
		want   int64
	}{
		{"nobody", nil, nil, 0},
		{"ours only", nil, spread(5), 0},
		{"outside", []held{{off - 1, 1, unix.F_WRLCK}, {off + n, 1, unix.F_WRLCK}}, nil, 0},
		{"at the ends", []held{{off + n - 1, 1, unix.F_WRLCK}, {off, 1, unix.F_WRLCK}}, nil, 2},
		{"descending", []held{{off + 9, 1, unix.F_WRLCK}, {off + 5, 1, unix.F_WRLCK}, {off + 1, 1, unix.F_WRLCK}}, nil, 3},
		{"neighbours", []held{{off + 2, 1, unix.F_WRLCK}, {off + 1, 1, unix.F_WRLCK}, {off + 3, 1, unix.F_WRLCK}}, nil, 3},
		{"shared", []held{{off + 2, 1, unix.F_RDLCK}, {off + 2, 1, unix.F_RDLCK}, {off + 1, 1, unix.F_RDLCK}}, nil, 2},
		{"to the end of all", []held{{off + 7, 0, unix.F_WRLCK}, {off + 1, 1, unix.F_WRLCK}}, nil, 2},
		{"over both ends", []held{{off - 5, n + 10, unix.F_WRLCK}}, nil, 1},
		{"many", spread(300), []held{{off + n/2 + 1, 1, unix.F_WRLCK}}, 300},
		{"more than are counted", spread(mostOthers + 10), nil, mostOthers},
	} {
		t.Run(test.name, func(t *testing.T) {
			f, err := os.Create(t.TempDir() + "/locks")
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			hold := func(f *os.File, h held) {
				l := unix.Flock_t{Type: h.kind, Start: h.off, Len: h.n}
				if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l); err != nil {
					t.Fatal(err)
				}
			}
			var other *os.File
			for i, h := range test.others {
				if i < 400 { // the rest has one holder: a process may not have so many files open
					if other, err = os.OpenFile(f.Name(), os.O_RDWR, 0); err != nil {
						t.Fatal(err)
					}
					defer other.Close()
				}
				hold(other, h)
			}
			for _, h := range test.own {
				hold(f, h)
			}
			if got, err := othersHold(f, off, n); err != nil || got != test.want {
				t.Errorf("%d, %v; want %d", got, err, test.want)
			}
		})
	}
}
