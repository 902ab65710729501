package testvm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"io"
	"os"

	"github.com/memlinux/memlinux/testvm/qmp"
)

// maxScreen bounds a screenshot's width and height in pixels, and so what a
// file that QEMU wrote can make us allocate.
const maxScreen = 4096

// screenshot makes the file at path, which QEMU has open, a PNG of the screen.
func (vm *VM) screenshot(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, monitorLimit)
	defer cancel()
	args := map[string]any{"filename": fmt.Sprintf("/dev/fdset/%d", fdsetScreenshot), "format": "png"}
	_, err := vm.monitor.Run(ctx, "screendump", args)
	if refused := (*qmp.Error)(nil); errors.As(err, &refused) {
		// QEMU before 7.1, or built without libpng, has only PPM.
		delete(args, "format")
		if _, err = vm.monitor.Run(ctx, "screendump", args); err == nil {
			err = ppmToPNG(path)
		}
	}
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	c, err := png.DecodeConfig(f)
	if err != nil {
		return fmt.Errorf("screenshot: %w", err)
	}
	if c.Width > maxScreen || c.Height > maxScreen {
		return fmt.Errorf("screenshot: %d×%d pixels", c.Width, c.Height)
	}
	return nil
}

func ppmToPNG(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	ppm, err := io.ReadAll(io.LimitReader(f, maxScreen*maxScreen*3+32))
	if err != nil {
		return err
	}
	img, err := parsePPM(ppm)
	if err != nil {
		return err
	}
	var out bytes.Buffer
	if err := png.Encode(&out, img); err != nil {
		return err
	}
	return os.WriteFile(path, out.Bytes(), 0o644) //nolint:gosec // as createAnew made it
}

// parsePPM reads the one form of PPM that QEMU writes: binary (P6), 255 levels,
// no comments (netpbm's ppm(5)).
func parsePPM(p []byte) (image.Image, error) {
	var width, height int
	head := string(p[:min(len(p), 32)])
	if n, err := fmt.Sscanf(head, "P6\n%d %d\n255\n", &width, &height); n != 2 || err != nil {
		return nil, fmt.Errorf("screenshot: not a PPM: %.16q", head)
	}
	if width <= 0 || height <= 0 || width > maxScreen || height > maxScreen {
		return nil, fmt.Errorf("screenshot: %d×%d pixels", width, height)
	}
	// Sscanf is lenient about spaces: hold the header against the only spelling.
	pixels, ok := bytes.CutPrefix(p, fmt.Appendf(nil, "P6\n%d %d\n255\n", width, height))
	if !ok || len(pixels) != width*height*3 {
		return nil, fmt.Errorf("screenshot: %d bytes for %d×%d pixels", len(pixels), width, height)
	}
	img := image.NewRGBA(image.Rect(0, 0, width, height))
	for y := range height {
		for x := range width {
			q := pixels[(y*width+x)*3:]
			img.SetRGBA(x, y, color.RGBA{q[0], q[1], q[2], 0xff})
		}
	}
	return img, nil
}
