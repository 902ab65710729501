package kbuildtest

import "testing"

// What other packages' tests boot is there.
func TestKernel(t *testing.T) {
	image, config := Kernel(t)
	t.Log(image, config)
}
