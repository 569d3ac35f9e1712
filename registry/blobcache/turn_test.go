package blobcache

import (
	"testing"
	"testing/synctest"
	"time"
)

// While another process has the lock of the directory, those who wait for it, and those who wait for them, do not stop the
// clock.
func TestWaitForTheDirectory(t *testing.T) {
	stage(t, func(t *testing.T) {
		dir := t.TempDir() + "/cache"
		other, c := openCacheAt(t, dir, Options{}), openCacheAt(t, dir, Options{})
		held, free := make(chan struct{}), make(chan struct{})
		done := make(chan error, 4)
		go func() {
			done <- other.space.locked(ctx, func() error { close(held); <-free; return nil })
		}()
		<-held
		for range cap(done) - 1 {
			go func() { done <- c.space.locked(ctx, func() error { return nil }) }()
		}
		began := time.Now()
		time.Sleep(time.Second)
		synctest.Wait()
		close(free)
		for range cap(done) {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("they had it %v after it was free", took-time.Second)
		}
	})
}
