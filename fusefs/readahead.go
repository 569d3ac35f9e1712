package fusefs

import (
	"os"
	"path/filepath"
	"runtime"
	"strconv"

	"github.com/erofs-oci/erofs-oci/backend"
)

// readaheadKiB is how far the kernel is to read ahead: two of the largest reads, so
// that one is decoded while the other is copied.
const readaheadKiB = 2 * maxRead >> 10

// raiseReadahead has the kernel read ahead farther than the 128 KiB that it allows
// a FUSE server to ask for (fs/fuse/inode.c process_init_reply). It takes root of
// the first user namespace, and a /sys that can be written.
func raiseReadahead(device backend.Device) error {
	return os.WriteFile(filepath.Join("/sys/class/bdi", string(device), "read_ahead_kb"), []byte(strconv.Itoa(readaheadKiB)), 0)
}

// maxReaders is go-fuse's bound of the goroutines that wait for requests.
const maxReaders = 16

// makeUpForReaders lets as many more goroutines run as go-fuse has waiting in
// read(2) for a request. The scheduler does not see that they wait until its
// monitor has looked twice, which may take 10 ms: with two processors one of them
// would do nothing meanwhile. What the user has set is left alone.
func makeUpForReaders() {
	if os.Getenv("GOMAXPROCS") != "" {
		return
	}
	runtime.SetDefaultGOMAXPROCS() // so that a second mount does not add to it
	n := runtime.GOMAXPROCS(0)
	runtime.GOMAXPROCS(n + min(n, maxReaders))
}
